"""The folder that a run lives in, and the record that lets a later process go on with it.

run.json      the options, and hashes of the model's config and of the corpus
LOCK          held while a process works here; holds its pid
log.jsonl     one JSON object per event
data/         tokens and tokenizer (see `dataset`)
checkpoints/  step-N/ ..., written by the engine
model/        what `transformers` loads, at the end
loss.png      the loss curve, at the end
trace.json    what the newest steps did and when, or those that were asked for
report.html   all of it to look at, whenever the run ends
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroxide.cli.paths import written_path
from zeroxide.cli.training.options import TrainOptions, conflicts
from zeroxide.errors import CheckpointError, ConfigError, StorageError

__all__ = ["Record", "RunFolder"]

_VERSION = 1
_CHECKPOINT = re.compile(r"step-(\d+)")
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Record:
    """What decides the numbers of a run: its options, and what they pointed at."""

    options: TrainOptions
    model_digest: str
    corpus_digest: str
    ranks: int = 1


def _given(out: str) -> Path:
    """The folder that --out names. Raises StorageError where nothing can be there."""
    try:
        return written_path(out)
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}", path=out, errno=error.errno) from None


class RunFolder:
    """A folder that one run works in alone. Made by `create` or `resume`, given up by `close`.

    Of several ranks the first holds it, and the others have it `shared`.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._lock: int | None = None
        if shared:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"--out {path} is a file or lies below one; a folder is needed", path="out") from None
        except OSError as error:
            raise StorageError(f"cannot write to {path}: {error.strerror}", path=path, errno=error.errno) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"{path} is in use by a live run (pid {holder}); give another --out", path="out"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor

    @classmethod
    def create(cls, out: str | None, model: str) -> RunFolder:
        """Open a folder for a new run. One with results in it is refused where it was asked for, else passed over."""
        if out is not None:
            folder = cls(_given(out))
            if folder.holds_results:
                folder.close()
                raise ConfigError(
                    f"{out} already holds a run; go on with it by --resume, or give another --out", path="out"
                )
            return folder
        for number in range(1, 1_000_000):
            path = _default_path(model, number)
            if not path.exists():
                return cls(path)
            with contextlib.suppress(ConfigError):  # in use by a live run: the next one, then
                folder = cls(path)
                if not folder.holds_results:
                    return folder
                folder.close()
        raise ConfigError(f"no free run folder next to {_default_path(model, 1)}; give --out", path="out")

    @classmethod
    def resume(cls, out: str | None, model: str) -> RunFolder:
        """Open the folder of an earlier run: `out`, or the one under `runs` that was worked in last."""
        if out is not None:
            path = _given(out)
        else:
            first = _default_path(model, 1)
            found = [p for p in first.parent.glob(f"{first.name}*/run.json") if p.is_file()]
            if not found:
                raise ConfigError(f"--resume: no run of {model} under {first.parent}; give its --out", path="resume")
            path = max(found, key=lambda p: p.stat().st_mtime_ns).parent
        if not (path / "run.json").is_file():
            raise ConfigError(f"--resume: {path} holds no run (no run.json)", path="resume")
        return cls(path)

    @property
    def holds_results(self) -> bool:
        """Whether there is something here that a new run must not overwrite."""
        return bool(self.checkpoints()) or (self.path / "model").exists()

    @property
    def log(self) -> Path:
        """The JSONL log."""
        return self.path / "log.jsonl"

    @property
    def data(self) -> Path:
        """Tokens and tokenizer."""
        return self.path / "data"

    @property
    def checkpoint_folder(self) -> Path:
        """Where the engine saves to and loads from."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, as `transformers` loads it."""
        return self.path / "model"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def trace(self) -> Path:
        """What some steps did and when, as Perfetto opens it."""
        return self.path / "trace.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints here, ascending."""
        if not self.checkpoint_folder.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(item.name) for item in self.checkpoint_folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def drop_old_checkpoints(self) -> None:
        """Remove all but the newest two checkpoints. Called after a newer one is committed."""
        for step in self.checkpoints()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(self.checkpoint_folder / f"step-{step}", ignore_errors=True)

    def write_record(self, record: Record) -> None:
        """Write `run.json`, aside and then by one rename."""
        value = {
            "version": _VERSION,
            "options": record.options.as_json(),
            "model_digest": record.model_digest,
            "corpus_digest": record.corpus_digest,
            "ranks": record.ranks,
        }
        aside = self.path / "run.json.new"
        try:
            aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
            aside.replace(self.path / "run.json")
        except OSError as error:
            raise StorageError(f"cannot write {aside}: {error.strerror}", path=aside, errno=error.errno) from None

    def read_record(self) -> Record:
        """Read `run.json`. Raises `CheckpointError` where it is damaged or from another version."""
        path = self.path / "run.json"
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if value["version"] != _VERSION:
                raise CheckpointError(
                    f"{path} has version {value['version']}, this zeroxide reads {_VERSION}", path=path
                )
            return Record(
                options=TrainOptions.from_json(value["options"]),
                model_digest=str(value["model_digest"]),
                corpus_digest=str(value["corpus_digest"]),
                ranks=int(value.get("ranks", 1)),
            )
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}", path=path) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}", path=path) from None

    def close(self) -> None:
        """Let other processes work here. Closing twice is allowed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def refuse_differences(recorded: Record, wanted: Record) -> None:
    """Raise `ConfigError`, naming every difference, where going on would not give the same numbers."""
    problems = conflicts(recorded.options, wanted.options)
    if recorded.model_digest != wanted.model_digest and not any(text.startswith("--model ") for text in problems):
        problems.append("the config of --model (changed since the run began)")
    if recorded.ranks != wanted.ranks:
        problems.append(f"the number of ranks (run: {recorded.ranks}, now: {wanted.ranks})")
    if recorded.corpus_digest != wanted.corpus_digest:
        problems.append("the text of --data (not what the run began with)")
    if problems:
        raise ConfigError(f"--resume: these differ from the run's: {'; '.join(problems)}", path="resume")


def _default_path(model: str, number: int) -> Path:
    name = Path(model).name or "model"
    return Path("runs", name if number == 1 else f"{name}-{number}")

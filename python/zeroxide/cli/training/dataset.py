"""The tokens of a run: made once by `prepare`, kept in the run folder, read in place.

    <run>/data/manifest.json    what the tokens were made from and what they are
    <run>/data/train.bin        the training stream
    <run>/data/held_out.bin     the held-out stream
    <run>/data/tokenizer/       as `transformers` saves it

Reading goes through `pread`, not through a mapping: pages of a mapping stay in the process's resident set, so a long
run over a large corpus would use up its memory budget with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from zeroxide.cli.training import prepare
from zeroxide.cli.training.corpus import Corpus
from zeroxide.errors import CheckpointError, DataError

__all__ = ["Dataset", "TokenFile", "open_dataset", "prepare_dataset"]

_VERSION = 1


class TokenFile:
    """A read-only array of `count` token numbers in a file. Any thread may read it."""

    def __init__(self, path: Path, dtype: str, count: int) -> None:
        self._dtype = numpy.dtype(dtype)
        self.path = path
        self.count = count
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> NDArray[numpy.int64]:
        """Return tokens [start, start + length). Raises `DataError` where the file ends before that."""
        size = self._dtype.itemsize
        data = os.pread(self._descriptor, length * size, start * size)
        if len(data) != length * size:
            raise DataError(
                f"{self.path} is cut short: expected {length} tokens at {start}, got {len(data) // size}",
                path=self.path,
            )
        return numpy.frombuffer(data, dtype=self._dtype).astype(numpy.int64)

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class Dataset:
    """The two token streams, what they were made from (`corpus_digest`), and the tokenizer that made them."""

    train: TokenFile
    held_out: TokenFile
    tokenizer_folder: Path
    vocabulary_size: int
    end_of_text: int | None
    corpus_digest: str
    description: str
    num_documents: int

    def close(self) -> None:
        """Close both files."""
        self.train.close()
        self.held_out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prepare_dataset(
    folder: Path,
    corpus: Corpus,
    *,
    tokenizer: Path | None,
    vocabulary_size: int,
    threads: int,
    say: Callable[[str], None],
) -> Dataset:
    """Return the tokens of `corpus`, from `folder` where they already lie there, else made now in another process.

    `tokenizer` is a directory with a tokenizer; None trains a byte-level BPE of at most `vocabulary_size` tokens.
    Raises `DataError`.
    """
    digest = corpus.digest()
    wanted = {"version": _VERSION, "corpus": digest, "tokenizer": _tokenizer_identity(tokenizer, vocabulary_size)}
    try:
        known = open_dataset(folder)
    except (DataError, CheckpointError):
        known = None
    if known is not None:
        if _manifest(folder)["made_from"] == wanted:
            say(f"data: {known.train.count:,} tokens from {folder}")
            return known
        known.close()
    # Made aside and renamed as a whole: a folder named `data` is always complete.
    aside = folder.with_name(folder.name + ".making")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        tokens = _run_prepare(aside, corpus, tokenizer, vocabulary_size, threads, say)
        manifest = {
            "made_from": wanted,
            "description": corpus.description,
            "num_documents": len(corpus.documents),
            "num_bytes": corpus.num_bytes,
            "tokens": tokens,
        }
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        raise DataError(f"cannot write {error.filename or folder}: {error.strerror}", path=folder) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_dataset(folder)


def open_dataset(folder: Path) -> Dataset:
    """Open the tokens in `folder`, after checking them against the manifest.

    Raises `DataError` where there are none, `CheckpointError` where they are not what the manifest says.
    """
    manifest = _manifest(folder)
    try:
        tokens = manifest["tokens"]
        for name in ("train", "held_out"):
            _verify(folder / f"{name}.bin", tokens[name], numpy.dtype(tokens["dtype"]).itemsize)
        files = {
            name: TokenFile(folder / f"{name}.bin", tokens["dtype"], tokens[name]["count"])
            for name in ("train", "held_out")
        }
        return Dataset(
            train=files["train"],
            held_out=files["held_out"],
            tokenizer_folder=folder / "tokenizer",
            vocabulary_size=tokens["vocabulary"],
            end_of_text=tokens["end_of_text"],
            corpus_digest=manifest["made_from"]["corpus"],
            description=manifest["description"],
            num_documents=manifest["num_documents"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/manifest.json is not a manifest of tokens: {error}", path=folder) from None


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no tokens in {folder}: {error.strerror}", path=folder) from None
    except ValueError:
        raise CheckpointError(f"{folder}/manifest.json is damaged", path=folder) from None
    if not isinstance(manifest, dict) or "made_from" not in manifest:
        raise CheckpointError(f"{folder}/manifest.json is not a manifest of tokens", path=folder)
    return manifest


def _verify(path: Path, expected: dict[str, Any], item_bytes: int) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", path=path) from None
    if size != expected["count"] * item_bytes:
        raise CheckpointError(f"{path}: expected {expected['count'] * item_bytes} bytes, got {size}", path=path)
    if digest != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its hash is not the one in the manifest", path=path)


def _tokenizer_identity(directory: Path | None, vocabulary_size: int) -> str:
    if directory is None:
        return f"byte-level BPE, {vocabulary_size}"
    total = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"):
        path = directory / name
        if path.is_file():
            total.update(f"{name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def _run_prepare(
    out: Path,
    corpus: Corpus,
    tokenizer: Path | None,
    vocabulary_size: int,
    threads: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    request = {
        "documents": [{"path": str(document.path), "held_out": document.held_out} for document in corpus.documents],
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocabulary": vocabulary_size,
        "out": str(out),
    }
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    # -P keeps the program's own folder off the path, where its neighbours would shadow modules of the same name.
    with (
        tempfile.TemporaryFile() as noise,
        subprocess.Popen(
            [sys.executable, "-P", prepare.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=environment,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        problem = ""
        try:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
            for line in child.stdout:
                message = json.loads(line)
                problem = message.get("error", problem)
                if "stage" in message:
                    say(f"data: {message['stage']} ({corpus.num_bytes / 1e6:.1f} MB, {len(corpus.documents)} files)")
            child.wait()
        except BaseException:
            child.kill()
            raise
        if child.returncode != 0:
            noise.seek(0)
            last = noise.read()[-300:].decode(errors="replace").strip()
            raise DataError(problem or f"the tokenizer process failed ({child.returncode}): {last}")
    tokens: dict[str, Any] = json.loads((out / "tokens.json").read_text(encoding="utf-8"))
    (out / "tokens.json").unlink()
    return tokens

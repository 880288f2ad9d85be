"""A directory of checkpoints in which every change is one rename, so that a kill at any instant loses nothing.

A save writes into `.saving-<random>/`, makes it durable, and renames it to its tag. Over an existing tag there are two
renames, the old checkpoint first to `.replaced-<tag>/`; killed between the two, the old one is found under that name.
`latest` changes last, by a rename as well.

Who is alive is told by flock, which ends with its process: a save holds the lock of its own directory while it
writes, and the lock of the whole directory while it renames. Where a file system has no flock, saves take care not to
remove what may belong to another one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zeroxide.checkpoint.format.manifest import MANIFEST
from zeroxide.checkpoint.format.stream import write_all
from zeroxide.checkpoint.load.foreign import foreign_format
from zeroxide.errors import CheckpointError

__all__ = [
    "Aside",
    "check_tag",
    "check_target",
    "discard",
    "find",
    "holds_nothing",
    "locked",
    "make_directory",
    "prepare",
    "publish",
    "set_latest",
    "sync_directory",
    "tidy",
    "write_new",
]

LATEST = "latest"
SAVING = ".saving-"
REPLACED = ".replaced-"
MAX_TAG_BYTES = 200


def check_tag(tag: str, save_dir: Path) -> None:
    """Raises CheckpointError unless `tag` can name a checkpoint in `save_dir`."""
    wrong = None
    if not tag or "/" in tag or "\0" in tag or any(not char.isprintable() for char in tag):
        wrong = "it must be one file name of printable characters"
    elif tag.startswith("."):
        wrong = "names that start with a dot are those of unfinished checkpoints"
    elif tag == LATEST:
        wrong = "that is the name of the file that points to the newest checkpoint"
    elif len(os.fsencode(tag)) > MAX_TAG_BYTES:
        wrong = f"it is longer than {MAX_TAG_BYTES} bytes"
    if wrong:
        raise CheckpointError(f"tag {tag[:60]!r} cannot name a checkpoint: {wrong}", path=save_dir)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory; they order renames themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool | None:
    """True: locked. False: another one holds it. None: there are no locks here."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a directory of checkpoints, if there are locks; waits for it. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Aside:
    """A new directory that the checkpoint `tag` is written into, which `commit` gives its name.

    Nobody else's `tidy` removes it until it is closed.
    """

    def __init__(self, save_dir: Path, tag: str) -> None:
        self.save_dir = save_dir
        self.tag = tag
        self.committed = False
        """Whether it has its tag; `latest` may still name another one."""
        self.path = save_dir / f"{SAVING}{secrets.token_hex(8)}"
        # Under the lock of the whole, so that no `tidy` runs between the two calls.
        with locked(save_dir):
            os.mkdir(self.path)
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(self._descriptor, fcntl.LOCK_EX)

    def commit(self, manifest: str, *, latest: bool) -> None:
        """Makes what was written, every file durable by now, the checkpoint; with `latest`, the one that is named so.

        Raises OSError, or CheckpointError where something else has the name.
        """
        write_new(self.path / MANIFEST, manifest)
        sync_directory(self.path)
        with locked(self.save_dir):
            tidy(self.save_dir)
            replaced = publish(self.path, self.save_dir, self.tag)
            self.committed = True
            if latest:
                set_latest(self.save_dir, self.tag)
            if replaced is not None:
                discard(replaced)

    def close(self) -> None:
        """Ends the claim. What was not committed is removed as far as possible."""
        if not self.committed:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def prepare(save_dir: Path, tag: str) -> None:
    """Makes the directory where it is missing and tidies it. Raises OSError, or CheckpointError where `tag` is taken
    by something that is no checkpoint."""
    make_directory(save_dir)
    with locked(save_dir):
        tidy(save_dir)
    check_target(save_dir / tag)


def tidy(save_dir: Path) -> None:
    """Brings back what a killed save had moved aside, and removes what dead saves left. Call under the lock."""
    for path in sorted(save_dir.iterdir()):
        if path.name.startswith(REPLACED):
            tag = save_dir / path.name.removeprefix(REPLACED)
            if tag.exists():
                _remove(path)
            else:
                os.rename(path, tag)
        elif path.name.startswith(SAVING):
            if path.is_dir() and not path.is_symlink():
                if _is_dead(path):
                    shutil.rmtree(path, ignore_errors=True)
            else:
                # What `set_latest` was writing: only under the lock, so nobody is.
                path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is True
    finally:
        os.close(descriptor)


def _remove(replaced: Path) -> None:
    """Removes a replaced checkpoint; first its name, so that half of it is never taken for the whole."""
    doomed = replaced.with_name(f"{SAVING}{secrets.token_hex(8)}")
    os.rename(replaced, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_target(target: Path) -> bool:
    """Whether there is a checkpoint at `target`. Raises CheckpointError if there is something else."""
    if not target.exists() and not target.is_symlink():
        return False
    if not (target / MANIFEST).is_file() or target.is_symlink():
        raise CheckpointError(
            f"{target} exists and is not a zeroxide checkpoint: choose another tag or move it away", path=target
        )
    return True


def make_directory(path: Path) -> None:
    """Creates a directory and its parents where they are missing, durably. Raises OSError."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)


def publish(aside: Path, save_dir: Path, tag: str) -> Path | None:
    """Gives a complete, durable checkpoint its tag. Call under the lock. Raises OSError or CheckpointError.

    Returns where the checkpoint is that had the tag before, if one had; give it to `discard` at the end.
    """
    target = save_dir / tag
    replaced = None
    if check_target(target):
        replaced = save_dir / f"{REPLACED}{tag}"
        os.rename(target, replaced)
    try:
        os.rename(aside, target)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, target)
        raise
    sync_directory(save_dir)
    return replaced


def discard(replaced: Path) -> None:
    """Removes the checkpoint that another one replaced. What stays is removed by the next save."""
    try:
        _remove(replaced)
    except OSError:
        return


def set_latest(save_dir: Path, tag: str) -> None:
    """Lets `latest` name `tag`. Call under the lock. Raises OSError."""
    aside = save_dir / f"{SAVING}{secrets.token_hex(8)}"
    try:
        write_new(aside, f"{tag}\n")
        os.rename(aside, save_dir / LATEST)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(save_dir)


def write_new(path: Path, text: str) -> None:
    """Writes a new, durable file. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(descriptor, memoryview(text.encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_nothing(load_dir: Path) -> bool:
    """Whether nothing was ever saved to `load_dir`: it does not exist, or has neither the file `latest` nor a manifest,
    its own or of a directory below."""
    try:
        inside = [Path(entry) for entry in os.scandir(load_dir)]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    saved = [each for each in inside if not each.name.startswith(".") or each.name.startswith(REPLACED)]
    known = any(each.name in (LATEST, MANIFEST) or (each / MANIFEST).exists() for each in saved)
    return not known and _foreign(load_dir) is None


def find(load_dir: Path, tag: str | None) -> Path:
    """The directory of the checkpoint `tag`, or of the one that `latest` names. Raises CheckpointError."""
    if not load_dir.is_dir():
        problem = "is a file: give the directory that was saved to" if load_dir.exists() else "does not exist"
        raise CheckpointError(f"no checkpoint: {load_dir} {problem}", path=load_dir)
    try:
        with locked(load_dir, shared=True):
            return _find(load_dir, tag)
    except OSError as error:
        raise CheckpointError(f"{error.filename or load_dir} cannot be read: {error.strerror}", path=load_dir) from None


def _find(load_dir: Path, tag: str | None) -> Path:
    origin = ""
    if tag is None:
        try:
            # A name is at most 255 bytes; anything longer is no pointer of ours.
            tag = (load_dir / LATEST).read_bytes()[:4096].decode(errors="replace").strip()
        except (FileNotFoundError, IsADirectoryError):
            if not (load_dir / MANIFEST).is_file() and (foreign := _foreign(load_dir)) is not None:
                raise CheckpointError(foreign, path=load_dir) from None
            if (load_dir / MANIFEST).is_file():
                advice = f"it is itself a checkpoint: load {str(load_dir.parent)!r} with tag={load_dir.name!r}"
            else:
                advice = _present(load_dir, "give tag=")
            raise CheckpointError(f"{load_dir} has no file `{LATEST}`: {advice}", path=load_dir) from None
        origin = f" (named by `{LATEST}`)"
        try:
            check_tag(tag, load_dir)
        except CheckpointError as error:
            raise CheckpointError(f"{load_dir / LATEST} is damaged: {error}", path=load_dir) from None
    check_tag(tag, load_dir)
    path = load_dir / tag
    if path.exists():
        return path
    replaced = load_dir / f"{REPLACED}{tag}"
    if replaced.exists():
        return replaced
    raise CheckpointError(
        f"no checkpoint {tag!r}{origin} in {load_dir}: {_present(load_dir, 'try tag=')}", path=load_dir
    )


def _foreign(load_dir: Path) -> str | None:
    """A line about a checkpoint of somebody else in the directory or in one below it."""
    for directory in (load_dir, *sorted(each for each in load_dir.iterdir() if each.is_dir())):
        if (found := foreign_format(directory)) is not None:
            return f"{directory} {found}"
    return None


def _present(load_dir: Path, verb: str) -> str:
    manifests = [path.parent for path in load_dir.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]
    newest = sorted(manifests, key=lambda path: path.stat().st_mtime_ns)[-3:]
    return verb + " or ".join(repr(path.name) for path in newest) if newest else "it holds no checkpoint"

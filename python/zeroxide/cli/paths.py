"""Paths as users write them on the command line."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

__all__ = ["written_path"]


def written_path(text: str) -> Path:
    """The path that `text` names, `~` expanded, whether anything is there or not.

    Raises OSError, with a reason for people, where nothing can be: for a user that is unknown, a name that is too long,
    and below a directory that this user cannot look into.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise OSError(errno.ENOENT, "no such user", text) from None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.stat()
    return path

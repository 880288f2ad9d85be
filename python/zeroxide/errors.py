"""What zeroxide raises when something outside its own code is wrong.

Each error is one line that says what, where and what to do; the numbers in that line are also fields, so that a
caller need not parse text. A fault of zeroxide itself (a broken invariant) is never one of these: it stays an
`AssertionError` or a `RuntimeError` with its traceback.

The command line prints `zeroxide: error: <line>` without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NumericsError",
    "RanksError",
    "StorageError",
    "ZeroxideError",
]


class ZeroxideError(Exception):
    """Base of every error a user can act on. Its message is a single line, whatever it was made from."""

    exit_code: ClassVar[int] = 2
    """Exit status of the command line: 2 where the request was wrong, 1 where the run failed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))

    @property
    def message(self) -> str:
        """The one line, without a prefix."""
        return str(self)


class ConfigError(ZeroxideError, ValueError):
    """The config, a keyword shortcut or a command-line option is wrong.

    `path` is the dotted path of the first wrong key ("zero_optimization.stage"), `expected` and `got` describe it,
    and `problems` holds one line for every wrong key that was found, this one first.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.path = path
        self.expected = expected
        self.got = got
        self.problems: tuple[str, ...] = tuple(problems) or (str(self),)


class BudgetError(ZeroxideError):
    """A byte budget cannot be kept. `need` and `limit` are bytes; `bucket` names what asked for them."""

    def __init__(
        self, message: str, *, need: int | None = None, limit: int | None = None, bucket: str | None = None
    ) -> None:
        super().__init__(message)
        self.need = need
        self.limit = limit
        self.bucket = bucket


class StorageError(ZeroxideError):
    """A file or directory could not be used, read, written or verified. `errno` is the system's code, if any."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)
        self.errno = errno


class ModelError(ZeroxideError):
    """The model cannot be trained as it is. `name` is the parameter or module concerned."""

    def __init__(self, message: str, *, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


class DataError(ZeroxideError):
    """The training data is missing, empty or too small. `path` is where it was looked for."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class CheckpointError(ZeroxideError):
    """A checkpoint is missing, incomplete, damaged or made for another model. `path` is its directory."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)


class NumericsError(ZeroxideError):
    """The loss or the gradients are not finite. `step` counts optimizer steps from 0; `value` is what was seen."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, step: int | None = None, value: float | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.value = value


class RanksError(ZeroxideError):
    """Ranks cannot be found, do not agree, or one of them is lost. `ranks` holds the ranks that the line blames."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

"""The scalar types of the schema, each with the sentence a user reads when a value does not fit, and the two marks.

A field of the schema does something, or carries one of the marks: `NoEffect` for a key that zeroxide does not need, and
`NotBuilt` for one that asks for something that zeroxide cannot do yet.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from zeroxide.config.sizes import parse_bytes

__all__ = [
    "BelowOne",
    "Betas",
    "ByteSize",
    "Count",
    "Directory",
    "File",
    "Flag",
    "Folder",
    "Fraction",
    "MemorySize",
    "NoEffect",
    "NonNegative",
    "NotBuilt",
    "Number",
    "PrintInterval",
    "Rates",
    "Removed",
    "Seconds",
    "Section",
    "Text",
    "WholeNumber",
    "asks_for_nothing",
    "choice",
    "directory",
    "expecting",
    "in_any_case",
    "whole",
    "whole_of_text",
]

LARGEST_COUNT = 2**31 - 1
LARGEST_SIZE = 1 << 50  # 1 PiB
SMALLEST_MEMORY = 1 << 20  # below 1 MiB a unit was forgotten


@dataclass(frozen=True)
class NoEffect:
    """Mark of a key that is accepted and does nothing, with the reason."""

    reason: str


@dataclass(frozen=True)
class NotBuilt:
    """Mark of a key that is refused unless its value asks for nothing: unless it is one of `neutral` where those are
    given, and otherwise unless `asks_for_nothing` holds."""

    what: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Removed(NotBuilt):
    """Mark of a key that DeepSpeed 0.19.8 does not have either, with what to use `instead`."""

    instead: str = "remove the key"


GROUP_SIZES = ("autotp_size", "tp_size", "ep_size")
"""Keys that split the work over as many processes: 1 asks for nothing."""


def asks_for_nothing(value: object) -> bool:
    """Whether a section or switch is off: false, 0, empty, `"enabled": false`, or made of nothing but such values."""
    if isinstance(value, dict):
        enabled = _bool_of(value.get("enabled"))
        if isinstance(enabled, bool):
            return not enabled
        return all(
            asks_for_nothing(item) or (key in GROUP_SIZES and item == 1 and item is not True)
            for key, item in value.items()
        )
    return value is None or value is False or value == "auto" or (isinstance(value, int | float) and value == 0)


class Section(BaseModel):
    """One object of the config: no key beyond the declared ones, nothing changes after parsing, no type is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    keeps_auto: ClassVar[frozenset[str]] = frozenset()
    """Keys in which "auto" is a value as any other."""

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        """`"auto"` and null mean unset. A key that is not known stays, so that it is still reported."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if not (key in cls.model_fields and (value is None or cls._is_auto(key, value)))
        }

    @classmethod
    def _is_auto(cls, key: str, value: Any) -> bool:
        return isinstance(value, str) and value == "auto" and key not in cls.keeps_auto


def expecting(text: str) -> WrapValidator:
    """Replace whatever the inner checks say by the one sentence `expected {text}`."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except (ValidationError, ValueError):
            raise PydanticCustomError("expected", "{expected}", {"expected": text}) from None

    return WrapValidator(check)


def choice(*names: str) -> WrapValidator:
    """Like `expecting`, for a `Literal`; upper and lower case are the same."""
    listed = ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value.lower() if isinstance(value, str) else value)
        except ValidationError:
            raise PydanticCustomError("expected", "{expected}", {"expected": listed}) from None

    return WrapValidator(check)


def whole(value: Any) -> Any:
    """JSON writers print large integers as `5e8`: take a float without a fraction as the integer it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bool_of(value: Any) -> Any:
    """`"true"` and `"false"` as some JSON writers print a switch."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def whole_of_text(value: Any) -> Any:
    """Digits in quotes as the integer they are; else as `whole`."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else whole(value)


def _size(value: Any) -> int:
    size = parse_bytes(value)
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError
    return size


def _memory(value: Any) -> int:
    size = _size(value)
    if size < SMALLEST_MEMORY:
        raise ValueError
    return size


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError
    if not all(isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta < 1 for beta in value):
        raise ValueError
    return float(value[0]), float(value[1])


def _rates(value: Any) -> float | list[float]:
    each = list(value) if isinstance(value, list | tuple) else [value]
    if not each or not all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in each):
        raise ValueError
    if not all(math.isfinite(rate) and rate >= 0 for rate in each):
        raise ValueError
    return [float(rate) for rate in each] if isinstance(value, list | tuple) else float(value)


def _momenta(value: Any) -> float | list[float]:
    found = _rates(value)
    if any(each >= 1 for each in (found if isinstance(found, list) else [found])):
        raise ValueError
    return found


def directory(value: Any) -> Path:
    """Return the path that `value` names, `~` expanded; whether it can be used is for the one who opens it to find."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        raise ValueError from None


def _folder(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ValueError
    return text


def _print_interval(value: Any) -> int | None:
    if isinstance(value, float) and value == float("inf"):
        return None
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
        raise ValueError
    return value


def in_any_case(*words: str) -> str:
    """A pattern of JSON schemas that takes each of `words` in upper and lower case."""
    each = ("".join(f"[{c.upper()}{c.lower()}]" if c.isalpha() else re.escape(c) for c in word) for word in words)
    return f"^({'|'.join(each)})$"


_SIZE_WORDS = {"type": "string", "pattern": r"^\s*(\d+(\.\d+)?|\.\d+)\s*([KMGTPkmgtp]?[Ii]?[Bb]|[KMGTPkmgtp])?\s*$"}


def _size_schema(least: int) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "integer", "minimum": least, "maximum": LARGEST_SIZE}, _SIZE_WORDS]})


_BETA = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_RATE = {"type": "number", "minimum": 0}
_MOMENTUM = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}

Flag = Annotated[bool, BeforeValidator(_bool_of), expecting("true or false")]
Count = Annotated[
    int, Field(ge=1, le=LARGEST_COUNT), BeforeValidator(whole), expecting(f"an integer from 1 to {LARGEST_COUNT}")
]
WholeNumber = Annotated[
    int, Field(ge=0, le=LARGEST_COUNT), BeforeValidator(whole), expecting(f"an integer from 0 to {LARGEST_COUNT}")
]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), expecting("a finite number, 0 or more")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), expecting("a finite number above 0")]
Number = Annotated[float, Field(allow_inf_nan=False), expecting("a finite number")]
Seconds = Annotated[float, Field(ge=1, le=86400, allow_inf_nan=False), expecting("a number of seconds from 1 to 86400")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), expecting("a number from 0 to 1")]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), expecting("a number of at least 0 and below 1")]
ByteSize = Annotated[
    int,
    PlainValidator(_size),
    expecting("a size above 0 and up to 1 PiB, in bytes or such as '64MiB'"),
    _size_schema(1),
]
MemorySize = Annotated[
    int,
    PlainValidator(_memory),
    expecting("a size from 1 MiB to 1 PiB, in bytes or such as '2GiB'"),
    _size_schema(SMALLEST_MEMORY),
]
Betas = Annotated[
    tuple[float, float],
    PlainValidator(_betas),
    expecting("two numbers, each at least 0 and below 1"),
    WithJsonSchema({"type": "array", "items": _BETA, "minItems": 2, "maxItems": 2}),
]
Momenta = Annotated[
    float | list[float],
    PlainValidator(_momenta),
    expecting("a number of at least 0 and below 1, or a list of one for each parameter group"),
    WithJsonSchema({"anyOf": [_MOMENTUM, {"type": "array", "items": _MOMENTUM, "minItems": 1}]}),
]
Rates = Annotated[
    float | list[float],
    PlainValidator(_rates),
    expecting("a finite number, 0 or more, or a list of one for each parameter group"),
    WithJsonSchema({"anyOf": [_RATE, {"type": "array", "items": _RATE, "minItems": 1}]}),
]
Directory = Annotated[
    Path,
    PlainValidator(directory),
    expecting("the path of a directory"),
    WithJsonSchema({"type": "string", "pattern": r"\S"}),
]
File = Annotated[
    Path,
    PlainValidator(directory),
    expecting("the path of a file"),
    WithJsonSchema({"type": "string", "pattern": r"\S"}),
]
Folder = Annotated[
    str,
    PlainValidator(_folder),
    expecting("the path of a directory, or nothing for the working directory"),
    WithJsonSchema({"type": "string"}),
]
Text = Annotated[str, Field(pattern=r"\S"), expecting("a text that is not empty")]
PrintInterval = Annotated[
    int | None,
    PlainValidator(_print_interval),
    expecting("an integer of at least 1, or Infinity for never"),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": LARGEST_COUNT}),
]

"""JSON as config files have it: comments (`//`, `#`, `/* */`) and trailing commas are allowed, a key twice is not."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["JsonError", "lines", "parse"]


class JsonError(ValueError):
    """The text is not an object in JSON with comments. The message says what and, where known, on which line."""


# One alternative per thing the scanner must tell apart; everything else passes through one character at a time.
_TOKEN = re.compile(
    r"""
      (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<line>(?://|\#)[^\n]*)
    | (?P<block>/\*.*?\*/)
    | (?P<open_block>/\*)
    | (?P<comma>,)
    | (?P<close>[}\]])
    | (?P<blank>\s+)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def _blank(text: str) -> str:
    """Return spaces of the same shape, so that positions in a later message still point into the user's file."""
    return re.sub(r"[^\n]", " ", text)


def strip_comments(text: str) -> str:
    """Return `text` with comments and trailing commas replaced by blanks; line and column numbers do not change."""
    parts: list[str] = []
    pending_comma: int | None = None  # index in `parts` of a comma that only blanks and comments have followed
    previous = ""  # the last significant character
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind in ("line", "block"):
            parts.append(_blank(token))
            continue
        if kind == "open_block":
            raise JsonError(f"line {text.count(chr(10), 0, match.start()) + 1}: a /* comment is never closed")
        if kind == "close" and pending_comma is not None:
            parts[pending_comma] = " "
        if kind != "blank":
            # A comma right after an opening or another comma separates nothing: leave it for the parser to refuse.
            pending_comma = len(parts) if kind == "comma" and previous not in ("", ",", "{", "[", ":") else None
            previous = token[-1]
        parts.append(token)
    return "".join(parts)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonError(f"the key {key!r} appears twice in one object")
        found[key] = value
    return found


def parse(text: str) -> dict[str, Any]:
    """Parse one JSON object with comments. Raises `JsonError`."""
    try:
        value = json.loads(strip_comments(text.removeprefix("\ufeff")), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise JsonError(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise JsonError("objects are nested too deeply") from None
    except ValueError as error:
        if isinstance(error, JsonError):
            raise
        raise JsonError(f"a number has too many digits ({error})") from None
    if not isinstance(value, dict):
        raise JsonError(f"expected one object in braces, got {type(value).__name__}")
    return value


_SPACE = re.compile(r"[ \t\r\n]*")


def lines(text: str) -> dict[str, int]:
    """The line of every key in a text that `parse` takes, from 1, by dotted path; objects inside lists are left out."""
    plain = strip_comments(text.removeprefix("\ufeff"))
    found: dict[str, int] = {}
    _keys(plain, _skip(plain, 0), "", found)
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _keys(text: str, at: int, prefix: str, found: dict[str, int]) -> int:
    """Notes the keys of the object that begins at `at`; returns where it ends."""
    at = _skip(text, at + 1)
    while text[at] != "}":
        begin = at
        name, at = json.JSONDecoder().raw_decode(text, at)
        path = f"{prefix}{name}"
        found[path] = text.count("\n", 0, begin) + 1
        at = _skip(text, _skip(text, at) + 1)  # the colon
        at = _keys(text, at, f"{path}.", found) if text[at] == "{" else json.JSONDecoder().raw_decode(text, at)[1]
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return at + 1

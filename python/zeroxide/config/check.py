"""Validate a section against its model, and say what is wrong in one line that a user understands."""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from zeroxide.config.fields import NoEffect, NotBuilt, Removed, Section, asks_for_nothing
from zeroxide.errors import ConfigError

__all__ = ["Problem", "dotted", "inspect", "nearest", "refusal", "section_of", "show", "validate"]

S = TypeVar("S", bound=Section)
Path = tuple[str, ...]


def dotted(path: Path) -> str:
    """Return `path` as a user writes it: `zero_optimization.stage`."""
    return ".".join(path)


def show(value: object) -> str:
    """Return `value` as JSON, cut to fit a line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: typing.Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most like `name`, upper and lower case being the same, or `None`."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def section_of(annotation: Any) -> type[Section] | None:
    """Return the model in `Model` or `Model | None`."""
    members = typing.get_args(annotation) or (annotation,)
    return next((each for each in members if isinstance(each, type) and issubclass(each, Section)), None)


def all_keys(model: type[BaseModel], prefix: Path = ()) -> Iterator[Path]:
    """Yield the path of every key that `model` knows, sections included."""
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        inner = section_of(info.annotation)
        if inner is not None:
            yield from all_keys(inner, (*prefix, name))


def _suggestion(path: Path, prefix: Path, model: type[Section], root: type[Section]) -> str:
    """Name the known key nearest to an unknown one: among its siblings first, then anywhere in the document."""
    siblings: type[Section] | None = model
    for name in path[len(prefix) : -1]:
        siblings = section_of(siblings.model_fields[name].annotation) if siblings else None
    close = nearest(path[-1], siblings.model_fields) if siblings else None
    if close is not None:
        return f'the nearest known key is "{dotted((*path[:-1], close))}"'
    elsewhere = {key[-1]: key for key in all_keys(root)}
    close = nearest(path[-1], elsewhere, cutoff=0.8)
    if close is not None:
        return f'the nearest known key is "{dotted(elsewhere[close])}"'
    return "no known key is like it"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a document: where, what was expected and what there was, and the line that says so.

    `path` ends at the key that is wrong or missing, or at an element of its list.
    """

    path: Path
    expected: str | None
    got: str | None
    line: str


def _problems(error: ValidationError, prefix: Path, model: type[Section], root: type[Section]) -> Iterator[Problem]:
    """Yield a problem for each thing pydantic found."""
    for item in error.errors(include_url=False):
        path = (*prefix, *(str(part) for part in item["loc"] if part != "[key]"))
        name = dotted(path)
        if item["type"] == "extra_forbidden":
            yield Problem(path, None, None, f'unknown key "{name}": {_suggestion(path, prefix, model, root)}')
        elif item["type"] == "missing":
            yield Problem(path, "a value", "nothing", f"{name}: required, and not given")
        else:
            expected = "an object" if item["type"] in ("model_type", "model_attributes_type") else item["msg"]
            expected = "a key that is a string" if item["type"] == "invalid_key" else expected
            got = show(item["input"])
            yield Problem(path, expected, got, f"{name}: expected {expected}, got {got}")


def _marks(section: Section, prefix: Path) -> Iterator[tuple[Path, NoEffect | NotBuilt, Any]]:
    """Yield (path, mark, value) for every marked key that the user gave."""
    for name, info in type(section).model_fields.items():
        if name not in section.model_fields_set:
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _marks(value, (*prefix, name))
        for mark in info.metadata:
            if isinstance(mark, NoEffect | NotBuilt):
                yield (*prefix, name), mark, value


def _is_off(value: object, neutral: tuple[Any, ...]) -> bool:
    """Whether the value of an unbuilt key asks for nothing. Equality here does not take true for 1."""
    if not neutral:
        return asks_for_nothing(value)
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def inspect(
    model: type[S],
    data: Mapping[str, Any],
    *,
    prefix: Path = (),
    root: type[Section] | None = None,
    no_effect: list[tuple[str, str]],
) -> tuple[S | None, list[Problem]]:
    """Return `data` as a `model`, None where it is none, and all that is wrong with it.

    Keys without effect are appended to `no_effect`. `prefix` is where `data` stands in the document, `root` the model
    of the whole document (for suggestions).
    """
    problems: list[Problem] = []
    section: S | None = None
    try:
        section = model.model_validate(dict(data))
    except ValidationError as error:
        problems += _problems(error, prefix, model, root or model)
    if section is not None:
        for path, mark, value in _marks(section, prefix):
            name = dotted(path)
            if isinstance(mark, NoEffect):
                no_effect.append((name, mark.reason))
            elif _is_off(value, mark.neutral):
                no_effect.append((name, f"{mark.what}: off, and not built yet"))
            else:
                line = f"{name}: {mark.what}: not built yet (got {show(value)}); remove the key or switch it off"
                if isinstance(mark, Removed):
                    line = f"{name}: {mark.what}: neither zeroxide nor DeepSpeed 0.19.8 has it; {mark.instead}"
                problems.append(Problem(path, None, show(value), line))
    return section, problems


def refusal(problems: Sequence[Problem], origin: str) -> ConfigError:
    """The error that names the first of `problems`, counts the others and has all of them in `found`."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more: {', '.join(dotted(each.path) for each in problems[1:4])})"
    return ConfigError(
        f"{origin}: {first.line}" + (more if len(problems) > 1 else ""),
        path=dotted(first.path),
        expected=first.expected,
        got=first.got,
        found=[
            ConfigError(each.line, path=dotted(each.path), expected=each.expected, got=each.got) for each in problems
        ],
    )


def validate(
    model: type[S],
    data: Mapping[str, Any],
    *,
    prefix: Path = (),
    root: type[Section] | None = None,
    origin: str = "config",
    no_effect: list[tuple[str, str]],
) -> S:
    """Return `data` as a `model`, as `inspect` does; `origin` is what the user calls the source.

    Raises `ConfigError` naming the first problem and counting the others.
    """
    section, problems = inspect(model, data, prefix=prefix, root=root, no_effect=no_effect)
    if problems or section is None:
        raise refusal(problems, origin)
    return section

"""Prints, as a JSON list, where zeroxide's names under `deepspeed` take other things than DeepSpeed's do.

Each line is "name parameter: what differs". A difference is one that a caller sees: a parameter that is not taken by
name or at its place, another default, one that must be given and need not be with DeepSpeed, a method or member that is
not there, another value.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed_signatures import describe, parameters_of

import zeroxide.integrations.deepspeed  # noqa: F401  (gives itself the name)
from zeroxide.engine.deepspeed_methods import ABSENT
from zeroxide.integrations.deepspeed.surface import SURFACE, Unbuilt

Parameters = list[list[Any]]


def differences(name: str, theirs: Parameters, ours: Parameters) -> Iterator[str]:
    """Those of one function."""
    places = {each[0]: at for at, each in enumerate(ours)}
    kinds = {kind for _, kind, _ in ours}
    for at, (parameter, kind, default) in enumerate(theirs):
        if kind in ("VAR_POSITIONAL", "VAR_KEYWORD"):
            if kind not in kinds:
                yield f"{name} *{parameter}: not taken"
        elif parameter not in places:
            if "VAR_KEYWORD" not in kinds:
                yield f"{name} {parameter}: not taken"
        else:
            _, own_kind, own_default = ours[places[parameter]]
            if own_default != default:
                yield f"{name} {parameter}: default {own_default}, not {default}"
            if kind == "POSITIONAL_OR_KEYWORD" and (places[parameter] != at or own_kind == "KEYWORD_ONLY"):
                yield f"{name} {parameter}: at another place"
    known = {each[0] for each in theirs}
    for parameter, kind, default in ours:
        if default is None and parameter not in known and not kind.startswith("VAR"):
            yield f"{name} {parameter}: must be given"


def differences_of(name: str, theirs: dict[str, Any], ours: Any) -> Iterator[str]:
    """Those of one name."""
    own = describe(name, ours)
    for key in ("value", "members"):
        if key in theirs and theirs[key] != own.get(key):
            yield f"{name}: {key} {own.get(key)}"
    if "parameters" in theirs:
        if "parameters" in own:
            yield from differences(name, theirs["parameters"], own["parameters"])
        else:
            yield f"{name}: no signature"
    for method, parameters in theirs.get("methods", {}).items():
        found = getattr(ours, method, None)
        if found is None:
            if method not in ABSENT or not name.endswith(".DeepSpeedEngine"):
                yield f"{name} {method}: not there"
        elif callable(found) != (parameters is not None):
            yield f"{name} {method}: a method, or none"
        elif parameters is not None:
            yield from differences(f"{name}.{method}", parameters, parameters_of(found) or [])


def main() -> None:
    """Prints them all."""
    theirs = json.loads(Path(__file__).with_name("deepspeed_signatures.json").read_text(encoding="utf-8"))["names"]
    found: list[str] = []
    for name, described in theirs.items():
        module, _, short = name.rpartition(".")
        if not isinstance(SURFACE.get(module, {}).get(short), Unbuilt):
            found += differences_of(name, described, getattr(importlib.import_module(module), short))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""State dicts of optimizers, checked as a whole before anything of them is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroxide.config import Rule
from zeroxide.errors import ConfigError
from zeroxide.optim.groups import assign, refuse_options
from zeroxide.optim.rules import FIXED, RULE, core_groups, rule_of, states

__all__ = ["SavedEntry", "check_saved", "hooked_load", "hooked_save", "name_of", "take_hyperparameters"]

_OWN = ("params", "param_names", "decoupled", "decoupled_weight_decay", *FIXED)


@dataclass(frozen=True)
class SavedEntry:
    """What a state dict has for one parameter: updates made so far, and the parts to be taken from `values`.

    The values are looked up when they are taken: they may be views that read as they go.
    """

    step: int
    parts: tuple[str, ...]
    values: Mapping[str, torch.Tensor]


def check_saved(
    given: Any, groups: list[dict[str, Any]], shapes: Sequence[Sequence[torch.Size]], *, exact: bool
) -> list[list[SavedEntry | None]]:
    """The entries of `given` for the parameters of `groups`, whose shapes are `shapes`; None where it has none.

    Takes what zeroxide's optimizers and torch's of the same rule give. `exact`: a "master" is wanted where there is
    one. Raises ConfigError, in one line, for anything that does not fit.
    """
    if not isinstance(given, Mapping) or not all(key in given for key in ("state", "param_groups")):
        _refuse("expected a dict with state and param_groups, as optimizer.state_dict() gives")
    saved, state = given["param_groups"], given["state"]
    if not isinstance(state, Mapping) or not isinstance(saved, list | tuple):
        _refuse("state is no dict, or param_groups no list")
    counts = [len(group["params"]) for group in groups]
    theirs = [len(group.get("params", ())) if isinstance(group, Mapping) else -1 for group in saved]
    if counts != theirs:
        _refuse(
            f"it has groups of {theirs} parameters, this optimizer of {counts} (frozen ones take no part): pass the "
            "same parameter groups"
        )
    for number, (mine, other) in enumerate(zip(groups, saved, strict=True)):
        _check_group(number, mine, other)
    numbers = {key for group in saved for key in group["params"]}
    unknown = [key for key in state if key not in numbers]
    if unknown:
        _refuse(f"state has an entry {unknown[0]!r} that no group has")
    return [
        [
            _entry(state.get(key), group, at, shape, rule_of(group, number), exact=exact)
            for at, (key, shape) in enumerate(zip(other["params"], of, strict=True))
        ]
        for number, (group, other, of) in enumerate(zip(groups, saved, shapes, strict=True))
    ]


def hooked_save(optimizer: torch.optim.Optimizer, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `save` gives, with the hooks that torch's `Optimizer.state_dict` calls."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    packed = save()
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        changed = after(optimizer, packed)
        packed = packed if changed is None else changed
    return packed


def hooked_load(
    optimizer: torch.optim.Optimizer, given: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Calls `load`, with the hooks that torch's `Optimizer.load_state_dict` calls."""
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = before(optimizer, given)
        given = given if changed is None else changed
    load(given)
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def take_hyperparameters(given: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Sets the hyperparameters of `groups` to those of a state dict that `check_saved` has passed."""
    for mine, other in zip(groups, given["param_groups"], strict=True):
        for name, value in other.items():
            if name not in _OWN:
                assign(mine, name, value)


def name_of(group: Mapping[str, Any], at: int) -> str:
    """A parameter as messages call it."""
    names = group.get("param_names")
    shape = tuple(group["params"][at].shape)
    return names[at] if names else f"parameter {at} of its group, of shape {shape},"


def _check_group(number: int, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    rule = rule_of(mine, number)
    if rule_of({RULE: rule.name, **other}, number) is not rule:
        _refuse(f"group {number} was saved by {other[RULE]}, and is one of {rule.people()} here: make it the same")
    needed = [name for name in rule.names() if name not in (*rule.own, *rule.unsaved)]
    missing = [name for name in needed if name not in other]
    if missing:
        _refuse(f"group {number} has no {missing[0]}: expected that of {rule.people()}")
    refuse_options(other)
    problem = rule.saved_by_another(mine, other)
    if problem is not None:
        _refuse(f"group {number} {problem}")
    core_groups([{**mine, **{name: other[name] for name in needed}}])


def _entry(
    found: Any, group: Mapping[str, Any], at: int, shape: torch.Size, rule: type[Rule], *, exact: bool
) -> SavedEntry | None:
    if isinstance(found, Mapping):
        found = rule.entry(found)
    if found is None:
        return None
    name = name_of(group, at)
    if not isinstance(found, Mapping):
        _refuse(f"the entry of {name} is a {type(found).__name__}, expected a dict")
    own = states(rule)
    unknown = [key for key in found if key not in ("step", *own, "master")]
    missing = [part for part in ("step", *own) if part not in found]
    if unknown or missing:
        wrong = f"has {unknown[0]!r}" if unknown else f"has no {missing[0]!r}"
        expected = " and ".join(", ".join(("step", *own)).rsplit(", ", 1))
        verb = "have" if len(rule.types) > 1 else "has"
        people = " and ".join(rule.types)
        _refuse(f"the entry of {name} {wrong}: expected {expected}, as {people} {verb}")
    parts = (*own, *(("master",) if exact and "master" in found else ()))
    for part in parts:
        value = found[part]
        if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
            what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            _refuse(f"{part} of {name} is {what}: expected floating-point values of shape {tuple(shape)}")
    try:
        step = float(found["step"])
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (step >= 0 and step.is_integer()):
        _refuse(f"step of {name} is {found['step']!r}: expected a whole number, not negative")
    return SavedEntry(int(step), parts, found)


def _refuse(problem: str) -> Any:
    raise ConfigError(f"load_state_dict: {problem}", path="optimizer")

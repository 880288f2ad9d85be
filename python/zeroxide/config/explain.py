"""Every key of a config with its effective value, and where that comes from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zeroxide.config.check import show
from zeroxide.config.resolve import resolve
from zeroxide.config.resolved import Config
from zeroxide.config.source import Source
from zeroxide.errors import ConfigError

__all__ = ["OTHER_DEFAULTS", "Explained", "Value", "explain", "given_keys", "left_auto"]

OTHER_DEFAULTS: dict[str, Any] = {
    "aio.queue_depth": 8,
    "torch_autocast.dtype": "torch's, which is float16 on a GPU",
    "zero_optimization.leaf_module.classes": "the expert layers of Mixtral and Qwen MoE models",
}
"""Defaults of DeepSpeed 0.19.8 that are not zeroxide's, by key."""

_OTHER_NAMES = {
    "bf16.enabled": ("bfloat16.enabled",),
    "bf16.check_grad_overflow": ("bfloat16.check_grad_overflow",),
    "zero_optimization.stage": ("zero_optimization",),
    "zero_optimization.offload_param.device": ("zero_optimization.cpu_offload_param",),
    "zero_optimization.offload_optimizer.device": ("zero_optimization.cpu_offload",),
    "zeroxide.mesh.pp": ("pipeline.stages",),
    "zeroxide.mesh.tp": ("tensor_parallel.autotp_size", "tensor_parallel.tp.tp_size"),
    "zeroxide.checkpoint_background": ("checkpoint.writer.decoupled",),
}
"""What else a document may say instead of a key."""


@dataclass(frozen=True)
class Value:
    """A key, what it comes to, and why.

    `origin` is "file", "derived" or "default"; `why` says it in words. `line` is that of the key in its file, None
    where it does not stand there. A value of None is one that the engine or the plan chooses.
    """

    key: str
    value: Any
    origin: str
    why: str
    line: int | None = None


@dataclass(frozen=True)
class Explained:
    """What a config comes to."""

    config: Config
    source: Source
    world_size: int
    values: list[Value]
    """Keys with an effect, in the order of the sections."""
    no_effect: list[Value]
    """Keys of the document that were accepted and do nothing; `why` has the reason."""


def explain(source: Source, *, world_size: int = 1) -> Explained:
    """What the document comes to on `world_size` ranks, key by key. Raises ConfigError as `load` does."""
    config = _resolved(source.data, source.origin, world_size)
    given = dict(given_keys(source.data))
    causes = _Causes(source, given, world_size)
    values = [_value(key, value, source, given, causes) for key, value in config.written().items()]
    idle = [
        Value(key, given.get(key, source.data.get(key)), "file", reason, source.line(key))
        for key, reason in config.no_effect
    ]
    return Explained(config, source, world_size, values, idle)


def given_keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a document with its value, by dotted path, sections themselves left out."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from given_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def left_auto(source: Source) -> list[str]:
    """The keys that are "auto": Hugging Face's Trainer and Accelerate fill them in before they are read."""
    return [key for key, value in given_keys(source.data) if value == "auto"]


def _resolved(data: Mapping[str, Any], origin: str, world_size: int) -> Config:
    return resolve(data, {}, world_size=world_size, origin=origin)


def _value(key: str, value: Any, source: Source, given: Mapping[str, Any], causes: _Causes) -> Value:
    names = (key, *_OTHER_NAMES.get(key, ()))
    said = next((each for each in names if given.get(each, "auto") not in ("auto", None)), None)
    if said is not None:
        shown = given[said] if said == key else value
        return Value(key, shown, "file", source.where(said), source.line(said))
    line = source.line(key) if key in given else None
    left = "" if line is None else f" ({show(given[key])} in {source.where(key)} was left over)"
    found = causes.of(key, value)
    if found:
        return Value(key, value, "derived", f"from {' and '.join(found)}{left}", line)
    return Value(key, value, "default", f"{_default(key)}{left}", line)


def _default(key: str) -> str:
    """Whose default the value of a key is."""
    if key.startswith("zeroxide."):
        return "default"
    other = OTHER_DEFAULTS.get(key)
    return "default, as DeepSpeed 0.19.8" if other is None else f"default; DeepSpeed 0.19.8 has {other}"


class _Causes:
    """Which of the given keys decide a key that is not given: those without which it would be another."""

    def __init__(self, source: Source, given: Mapping[str, Any], world_size: int) -> None:
        self._without: list[tuple[str, dict[str, Any]]] = []
        for key, value in given.items():
            if value not in ("auto", None):
                self._note(f"{key} ({source.where(key)})", _lacking(source.data, key), world_size)
        if world_size > 1:
            self._note(f"{world_size} ranks", source.data, 2 * world_size)

    def _note(self, name: str, data: Mapping[str, Any], world_size: int) -> None:
        try:
            self._without.append((name, _resolved(data, "config", world_size).written()))
        except ConfigError:
            return  # what is left makes no config: the key decides more than a value

    def of(self, key: str, value: Any) -> list[str]:
        """What decides that `key` is `value`, in words; nothing where it is so anyway."""
        return [name for name, said in self._without if said.get(key, value) != value]


def _lacking(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A copy of the document without the key at a dotted path."""
    rest: dict[str, Any] = copy.deepcopy(dict(data))
    section: Any = rest
    *outer, last = key.split(".")
    for name in outer:
        section = section[name]
    del section[last]
    return rest

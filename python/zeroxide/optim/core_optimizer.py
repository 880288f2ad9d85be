"""Optimizers for a plain PyTorch loop, with their state in host memory or on disk."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from zeroxide import _core
from zeroxide.config import FORMATS, RULES, load, parse_bytes
from zeroxide.device.placement import DTYPE_NAMES, HOST, in_host_memory, plain, spec, to_host
from zeroxide.errors import ConfigError, ModelError
from zeroxide.optim.groups import check_format, planned
from zeroxide.optim.rules import FORMAT, RULE, core_groups, rule_of, states
from zeroxide.optim.saved_state import (
    SavedEntry,
    check_saved,
    hooked_load,
    hooked_save,
    name_of,
    take_hyperparameters,
)
from zeroxide.optim.state_view import ParameterState, StateView
from zeroxide.plan.state import StatePlan, rounding_stream
from zeroxide.precision.bits import round_into

__all__ = ["CoreOptimizer"]


@dataclass
class _ParamLocation:
    """Where one parameter's state is, and what the parameter was when it was placed."""

    core: _core.Offload
    unit: int
    group: int
    dtype: torch.dtype
    shape: torch.Size


class CoreOptimizer(torch.optim.Optimizer):
    """The base of optimizers for a plain PyTorch loop: the core holds the state that a rule keeps.

    Parameters stay ordinary fp32 or bf16 tensors in host memory. The rule's state tensors, and for bf16 parameters what
    makes their weights exact, are in host memory (`offload="none"` or "cpu") or on disk ("nvme:DIR"); results are the
    same bits in every case. bf16 parameters are updated with an exact fp32 master weight; what is written into one at
    any time is taken over by the next step.

    params: parameters, (name, parameter) pairs or group dicts; frozen ones are placed once they have a gradient.
    hyperparameters: the group's, all that the rule `rule` has; tensors are read at every step. offload: see above.
    format: "split", "fp32", "split-bf16" or "compact" for bf16 parameters. host_memory: most bytes of state in memory
    ("1GiB" or an int). threads: compute threads, by default one a CPU.

    Raises ModelError for parameters that are not contiguous fp32 or bf16 in host memory, ConfigError for options,
    BudgetError and StorageError where the state does not fit.
    """

    rule: ClassVar[str]
    """What a parameter group calls the rule."""
    places_late: ClassVar[bool] = False
    """Whether state takes no memory before the first step, as with an optimizer that an engine may take over."""

    def __init__(
        self,
        params: Iterable[Any],
        hyperparameters: Mapping[str, Any],
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        home = load(None, lr=1e-3, offload_optimizer=offload).zero.offload_optimizer
        if format not in FORMATS:
            raise ConfigError(f"format {format!r}: expected one of {', '.join(FORMATS)}", path="format", got=format)
        defaults = {RULE: self.rule, **hyperparameters}
        self._format = format
        self._limit = None if host_memory is None else parse_bytes(host_memory)
        self._directories: list[Any] = [home.path] if home.kind == "nvme" and home.path is not None else []
        self._threads = threads or len(os.sched_getaffinity(0))
        self._places: dict[int, _ParamLocation] = {}
        self._cores: list[_core.Offload] = []
        self._closed = False
        self._made = False
        super().__init__(params, defaults)
        self._check_rules()
        core_groups(self.param_groups)
        self._made = True
        self._place_first()

    def _check_rules(self) -> None:
        """Raises ConfigError for a group that names another rule, as an optimizer has one, or no format."""
        for number, group in enumerate(self.param_groups):
            check_format(group.get(FORMAT, self._format), number)
            if rule_of(group, number).name != self.rule:
                raise ConfigError(
                    f"optimizer group {number} asks for {group[RULE]!r}, and this optimizer is {self.rule}: make one "
                    "optimizer for each, or use zeroxide.initialize, whose groups may differ",
                    path=RULE,
                )
            group[RULE] = self.rule

    def _members(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(group, position in it, parameter)."""
        for number, group in enumerate(self.param_groups):
            for at, param in enumerate(group["params"]):
                yield number, at, param

    def _name(self, group: int, at: int) -> str:
        return name_of(self.param_groups[group], at)

    def _place_first(self) -> None:
        """Places the parameters that require a gradient, or checks that they can be placed."""
        if self.places_late:
            self._new(lambda param: param.requires_grad)
        else:
            self._place_new(lambda param: param.requires_grad)

    def _new(self, wanted: Callable[[torch.Tensor], bool]) -> list[tuple[int, int, torch.Tensor]]:
        """The wanted parameters that are not placed yet, as `_members` lists them. Raises for one that cannot be."""
        new = [
            (group, at, param)
            for group, at, param in self._members()
            if id(param) not in self._places and param.numel() and wanted(param)
        ]
        for group, at, param in new:
            self._check(group, at, param)
        return new

    def _place_new(self, wanted: Callable[[torch.Tensor], bool]) -> None:
        """Places the wanted parameters that are not placed yet. Raises before anything is placed."""
        new = self._new(wanted)
        for dtype in (torch.float32, torch.bfloat16):
            members = [each for each in new if each[2].dtype is dtype]
            if members:
                self._make_core(dtype, members)

    def _check(self, group: int, at: int, param: torch.Tensor) -> None:
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise ModelError(f"{self._name(group, at)} is {param.dtype}: expected fp32 or bf16")
        if not in_host_memory(param) or not param.is_contiguous():
            raise ModelError(f"{self._name(group, at)} is not contiguous in host memory ({param.device})")

    def _make_core(self, dtype: torch.dtype, members: list[tuple[int, int, torch.Tensor]]) -> None:
        """One core for parameters of one dtype: one unit a parameter, whose weight is lent for each step.

        `members` are as `_members` lists them.
        """
        state = _core.StateHome.DISK if self._directories else _core.StateHome.HOST
        rules = core_groups(self.param_groups)
        low = dtype is torch.bfloat16
        formats = [group.get(FORMAT, self._format) if low else "fp32" for group in self.param_groups]
        for number, (rule, format) in enumerate(zip(rules, formats, strict=True)):
            planned(rule, self.rule, format, dtype, number)
        used = sum(core.usage()["total"][0] for core in self._cores)
        units = [
            _core.UnitSpec(
                name=f"parameter {number}",
                params=[(param.numel(), True)],
                weights=_core.WeightHome.BORROWED,
                state=state,
                optimizer=rules[group],
                format=formats[group],
                streams=[rounding_stream(0, f"group {group}, parameter {at}")],
            )
            for number, (group, at, param) in enumerate(members)
        ]
        settings = _core.Settings(
            limit=None if self._limit is None else max(0, self._limit - used),
            threads=self._threads,
            compute=DTYPE_NAMES[dtype],
            grad=DTYPE_NAMES[dtype],
            tile_elements=_core.DEFAULT_TILE_ELEMENTS,
            staging_bytes=_core.DEFAULT_STAGING_BYTES if self._directories else 0,
            gathered_bytes=0,
            engine=_core.IoEngine.AUTO,
            queue_depth=32,
            directories=self._directories,
            job=f"{self.rule}-{os.getpid()}-{secrets.token_hex(4)}",
        )
        core = _core.Offload(settings, units)
        self._cores.append(core)
        # Also at the end of the process, which may come without `close`: scratch files are large.
        weakref.finalize(self, core.close)
        for unit, (group, _, param) in enumerate(members):
            core.fill_begin(unit, "weights")
            values = plain(param.detach().to(torch.float32)).view(-1)
            core.fill_param(unit, 0, 0, spec(values))
            core.fill_commit(unit)
            core.set_group(unit, 0, group)
            self._places[id(param)] = _ParamLocation(core, unit, group, dtype, param.shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in place. Returns the closure's loss, if there is one.

        Raises ModelError, before anything is updated, for a parameter that became something else than what was placed,
        and for a gradient that does not fit it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._closed:
            raise RuntimeError("the optimizer was closed, or an engine has taken its groups over: call engine.step()")
        groups = core_groups(self.param_groups)
        self._place_new(lambda param: param.grad is not None)
        used = [
            (param, self._checked(group, at, param))
            for group, at, param in self._members()
            if param.grad is not None and param.numel()
        ]
        for param, place in used:
            assert param.grad is not None
            place.core.lend(place.unit, spec(param.data), spec(plain(param.grad)))
        for core in self._cores:
            core.step(groups, 1.0)
        return loss

    def _checked(self, group: int, at: int, param: torch.Tensor) -> _ParamLocation:
        place = self._places[id(param)]
        if param.dtype is not place.dtype or param.shape != place.shape:
            raise ModelError(
                f"{self._name(group, at)} is {param.dtype} {tuple(param.shape)} and was {place.dtype} "
                f"{tuple(place.shape)} when its optimizer state was placed: make the optimizer after such changes"
            )
        self._check(group, at, param)
        grad = param.grad
        if grad is not None and grad.layout is not torch.strided:
            raise ModelError(
                f"the gradient of {self._name(group, at)} is sparse ({grad.layout}): use dense gradients, as with "
                "Embedding(sparse=False)"
            )
        if grad is not None and (
            grad.shape != param.shape or grad.dtype not in DTYPE_NAMES or not in_host_memory(grad)
        ):
            raise ModelError(
                f"the gradient of {self._name(group, at)} is {grad.dtype} {tuple(grad.shape)} on {grad.device}: "
                f"expected fp32, bf16 or fp16 of shape {tuple(param.shape)} in host memory"
            )
        if place.group != group:
            place.core.set_group(place.unit, 0, group)
            place.group = group
        return place

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Parameters that require a gradient are placed at once, others when they have one."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        if not self._made:
            return
        try:
            self._check_rules()
            core_groups(self.param_groups)
            self._place_first()
        except BaseException:
            del self.param_groups[before:]
            raise

    def _read(self, param: torch.Tensor, part: str) -> torch.Tensor:
        place = self._places[id(param)]
        if part == "step":
            return torch.tensor(float(place.core.updates(place.unit, 0)), device=HOST)
        out = torch.empty(place.shape, dtype=torch.float32, device=HOST)
        if part != "master":
            place.core.read_param(place.unit, 0, part, 0, spec(out))
            return out
        if param.dtype is not place.dtype or param.shape != place.shape:
            raise ModelError(
                f"a parameter is {param.dtype} {tuple(param.shape)} and was {place.dtype} {tuple(place.shape)} when "
                "its optimizer state was placed: its exact weight cannot be read"
            )
        place.core.lend(place.unit, spec(plain(param.data)), spec(torch.zeros_like(param)))
        place.core.read_param(place.unit, 0, "weights", 0, spec(out))
        place.core.clear_gradients()
        return out

    def _entry(self, param: torch.Tensor, *, shown: bool) -> ParameterState:
        exact = ("master",) if self._places[id(param)].dtype is torch.bfloat16 else ()
        return ParameterState(
            ("step", *states(RULES[self.rule]), *exact), lambda part: self._read(param, part), shown=shown
        )

    @property  # type: ignore[override]
    def state(self) -> StateView:
        """Each placed parameter's "step", the rule's state tensors and, for bf16, "master": copies, read on access."""
        return StateView(
            {param: self._entry(param, shown=True) for _, _, param in self._members() if id(param) in self._places}
        )

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor sets an empty one.
        if self._made:
            raise ModelError("optimizer.state cannot be set: the state lies in the core; use load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """As torch's: per parameter "step", the rule's state tensors and, for bf16, "master", read into memory."""
        return hooked_save(self, self._pack)

    def _pack(self) -> dict[str, Any]:
        groups: list[dict[str, Any]] = []
        state: dict[int, dict[str, torch.Tensor]] = {}
        number = 0
        for group in self.param_groups:
            first = number
            for param in group["params"]:
                if id(param) in self._places:
                    state[number] = dict(self._entry(param, shown=False))
                number += 1
            groups.append({**group, "params": list(range(first, number))})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict`, that of an engine's optimizer, or of torch's of the same rule gave.

        bf16 parameters become their "master", rounded; a parameter that there is no state for starts anew. Raises
        ConfigError, in one line, for whatever does not fit, before anything has changed.
        """
        hooked_load(self, state_dict, self._unpack)

    def _unpack(self, packed: dict[str, Any]) -> None:
        shapes = [[param.shape for param in group["params"]] for group in self.param_groups]
        found = check_saved(packed, self.param_groups, shapes, exact=True)
        saved: dict[int, SavedEntry | None] = {}
        for group, entries in zip(self.param_groups, found, strict=True):
            saved.update({id(param): entry for param, entry in zip(group["params"], entries, strict=True)})
        self._place_new(lambda param: saved[id(param)] is not None)
        members = [each for each in self._members() if id(each[2]) in self._places]
        places = [self._checked(group, at, param) for group, at, param in members]
        take_hyperparameters(packed, self.param_groups)
        for (_, _, param), place in zip(members, places, strict=True):
            self._load_one(param, place, saved[id(param)])

    def _load_one(self, param: torch.Tensor, place: _ParamLocation, entry: SavedEntry | None) -> None:
        core, unit = place.core, place.unit
        core.set_updates(unit, 0, 0 if entry is None else entry.step)
        exact = entry is not None and "master" in entry.parts and place.dtype is torch.bfloat16
        group = self.param_groups[place.group]
        initial = StatePlan.of(core_groups([group])[0], self.rule, "fp32", torch.float32).initial
        for part in (*initial, *(("master",) if exact else ())):
            values = (
                torch.full(place.shape, initial[part], dtype=torch.float32, device=HOST)
                if entry is None
                else to_host(entry.values[part])
            )
            target = "weights" if part == "master" else part
            core.fill_begin(unit, target)
            core.fill_param(unit, 0, 0, spec(values.view(-1)))
            core.fill_commit(unit)
            if part == "master":
                round_into(values.view(-1), param.data)

    def close(self) -> None:
        """Removes the scratch files and gives the memory of the state back. Idempotent."""
        self._closed = True
        for core in self._cores:
            core.close()

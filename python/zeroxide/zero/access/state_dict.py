"""The model's state dict with full values, out of an engine and into it.

`module.state_dict()` of any module of an engine has all values, and so has what is built on it, such as
`save_pretrained`. At stages 0 to 2 its tensors are the live weights, as they are in torch. At stage 3 they are copies:
a module's parameters are gathered one by one while it writes its part of the dict, which takes as much memory as the
module on every rank that asks. Over several ranks all must ask: one that asks alone says in the log what it waits for,
and the watch ends the job when the others do something else. Where scripts for DeepSpeed run, in which ranks ask alone,
dicts over several ranks have names and shapes without values, and say so when values are asked for.

Loading a dict into a module of an engine is refused at every stage: parameters are empty, or master weights would not
hear of it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zeroxide.device.placement import HOST, in_host
from zeroxide.errors import ConfigError, ModelError
from zeroxide.parallel.tensor import shard_of
from zeroxide.params.absent import AbsentValues
from zeroxide.params.callers import called_by
from zeroxide.params.handle import handle_of
from zeroxide.precision.bits import FLOATS, converted, converts, copy_of, holds_exactly, tensor_of, why_not_bytes
from zeroxide.rows import RowRange, blocks_of, in_blocks, rows_of
from zeroxide.zero.access.experts import add_experts, experts_of
from zeroxide.zero.buffers import set_buffer
from zeroxide.zero.hook_handle import Hook, Method
from zeroxide.zero.names import own_name, plain_name
from zeroxide.zero.param import ParameterContext, ShardedParam, sharded_param_of

__all__ = [
    "StateDicts",
    "full_state_dict",
    "load_full_state_dict",
    "load_given_state_dict",
    "refuse_custom_load",
    "refuse_loading",
]

logger = logging.getLogger("zeroxide")

SAVE = "_save_to_state_dict"
"""The method of every module that writes its own part of a state dict."""


class StateDicts:
    """Gives state dicts of modules at stage 3 the values that their parameters do not show.

    patience: seconds after which a rank that asks says that it waits for others.
    """

    def __init__(self, module: nn.Module, context: ParameterContext, patience: float) -> None:
        self.context = context
        self.patience = patience
        # By parameter, what the last dict that asked for it was given: tied parameters are one tensor in a dict.
        self.given: dict[int, weakref.ref[torch.Tensor]] = {}
        self.given_whole: dict[int, weakref.ref[torch.Tensor]] = {}
        """The same of what was put together from the parts of several ranks."""
        self.changes = context.changes
        self.names_alone = False
        """Whether dicts over several ranks have names and shapes alone, so that one rank can ask by itself."""
        self.methods = [
            Method.put(each, SAVE, self._save, each, getattr(each, SAVE))
            for each in module.modules()
            if each._parameters and (not context.params_always_full or self._cut(each) or experts_of(each))
        ]

    def close(self) -> None:
        """Gives every module its own method back."""
        for method in self.methods:
            method.take_off()
        self.methods.clear()

    def _cut(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The module's own parameters of which these ranks have a part."""
        if self.context.whole.group is None:
            return {}
        found = {name: param for name, param in module._parameters.items() if param is not None}
        return {name: param for name, param in found.items() if shard_of(param) is not None}

    def _save(self, module: nn.Module, save: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        experts = [] if _bare else experts_of(module)
        if experts:
            self._save_experts(save, destination, prefix, experts)
            return
        self._save_own(module, save, destination, prefix, keep_vars)
        if _bare or keep_vars:
            return
        for name, param in self._cut(module).items():
            value, sharded = destination.get(prefix + name), sharded_param_of(param)
            if sharded is None or not isinstance(value, torch.Tensor) or isinstance(value, AbsentValues):
                continue
            shape = self.context.whole.shape(param, sharded.shape)
            if self.names_alone or called_by("peft", _NAMING):
                destination[prefix + name] = AbsentValues.of(sharded.name, shape, sharded.dtype)
                continue
            known = self.given_whole.get(sharded.ident, _gone)()
            if known is None or all(known is not other for other in destination.values()):
                with self._patient(sharded):
                    known = self.context.whole.of(param, in_host(value.detach()))
                self.given_whole[sharded.ident] = weakref.ref(known)
            destination[prefix + name] = known

    def _save_own(
        self, module: nn.Module, save: Any, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        sharded_params = {
            name: sharded
            for name, param in module._parameters.items()
            if param is not None and (sharded := sharded_param_of(param)) is not None and not sharded.holds
        }
        if _bare or not sharded_params:
            save(destination, prefix, keep_vars)
        elif self.context.ranks.world > 1 and (self.names_alone or called_by("peft", _NAMING)):
            self._save_names(save, destination, prefix, sharded_params)
        elif keep_vars:
            sharded = next(iter(sharded_params.values()))
            raise ModelError(
                f"state_dict(keep_vars=True): {sharded.name} was asked for itself, and it is empty: leave keep_vars "
                "out, or ask inside zeroxide.zero.GatheredParameters",
                name=sharded.name,
            )
        else:
            with self._patient(next(iter(sharded_params.values()))), self._shown(sharded_params, destination):
                save(destination, prefix, keep_vars)
                for name, sharded in sharded_params.items():
                    if isinstance(value := destination.get(prefix + name), torch.Tensor):
                        self.given[sharded.ident] = weakref.ref(value)

    def _save_experts(
        self, save: Any, destination: dict[str, Any], prefix: str, experts: list[tuple[str, ShardedParam]]
    ) -> None:
        """The module's part with the experts of all ranks, which all ask together."""
        own: dict[str, Any] = {}
        save(own, prefix, True)
        found: dict[str, torch.Tensor] = {}
        with self._patient(experts[0][1]):
            for name, sharded in experts:
                own.pop(prefix + name, None)
                add_experts(found, sharded, prefix + name)
        destination.update(found)
        destination.update({n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in own.items()})

    def _save_names(
        self, save: Any, destination: dict[str, Any], prefix: str, sharded_params: dict[str, ShardedParam]
    ) -> None:
        """The module's part without values of its parameters; nothing is exchanged."""
        own: dict[str, Any] = {}
        save(own, prefix, True)
        for name, sharded in sharded_params.items():
            shape = self.context.whole.shape(sharded.param, sharded.shape)
            own[prefix + name] = AbsentValues.of(sharded.name, shape, sharded.dtype)
        for name, value in own.items():
            destination[name] = value.detach() if isinstance(value, torch.Tensor) else value

    @contextmanager
    def _shown(self, sharded_params: dict[str, ShardedParam], destination: dict[str, Any]) -> Iterator[None]:
        """Lets the parameters show copies of all their values."""
        if self.changes != self.context.changes:
            self.given.clear()
            self.changes = self.context.changes
        opened = []
        try:
            for sharded in sharded_params.values():
                known = self.given.get(sharded.ident, _gone)()
                if known is None or all(known is not value for value in destination.values()):
                    known = None
                sharded.open(sharded.param, known)
                opened.append(sharded)
            yield
        finally:
            for sharded in opened:
                sharded.close(sharded.param, None)

    @contextmanager
    def _patient(self, first: ShardedParam) -> Iterator[None]:
        ranks, cut = self.context.ranks, self.context.whole.group is not None
        if ranks.world == 1 and not cut:
            yield
            return
        where = "where matrices are cut" if cut else "at stage 3"
        line = (
            f"rank {ranks.number(ranks.rank)} has waited {self.patience:.0f} s for the other ranks to ask for the "
            f"state of {first.name}: {where} every rank must call state_dict, and what builds on it, such as "
            "save_pretrained"
        )
        timer = threading.Timer(self.patience, logger.warning, [line])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


_NAMING = frozenset({"adapter_state_dict", "adapter_state_dict_load_map"})
"""Functions of PEFT (0.21.2, utils/other.py) that ask a module for the names in its dict, on the rank that saves alone:
the values they take from what the engine has gathered."""


def _gone() -> None:
    """Stands for a reference to nothing."""


_bare = False
"""Whether state dicts have the parameters as they are."""


def _parameters_and_buffers(module: nn.Module) -> dict[str, Any]:
    """The module's state under its names: parameters themselves, which may be empty, and buffers."""
    global _bare
    _bare = True
    try:
        with in_blocks():
            return module.state_dict(keep_vars=True)
    finally:
        _bare = False


def full_state_dict(
    module: nn.Module, context: ParameterContext, *, include_frozen: bool = True
) -> dict[str, torch.Tensor]:
    """Live weights and buffers under the names of `module.state_dict()`, on rank 0; nothing on the others.

    Every rank calls it. Tied parameters are one tensor under several names.
    """
    leads = context.ranks.rank == 0 and context.whole.leads
    kept: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    for name, value in _parameters_and_buffers(module).items():
        sharded = sharded_param_of(value) if isinstance(value, torch.Tensor) else None
        if sharded is not None and not include_frozen and not sharded.trainable:
            continue
        if sharded is not None and sharded.unit.experts:
            every: dict[str, torch.Tensor] = {}
            add_experts(every, sharded, name)
            if context.ranks.rank == 0:
                kept.update({plain_name(each): value for each, value in every.items()})
            continue
        if sharded is not None and (rows := rows_of(value)) is not None:
            _add_rows(kept, seen, plain_name(name), rows, sharded, leads=leads)
            continue
        if sharded is not None and id(value) not in seen:
            whole = context.whole.of(value, sharded.read_live().view(sharded.shape))
            seen[id(value)] = whole if leads else torch.empty(0, device=HOST)
        if leads:
            found = seen.get(id(value), value)
            kept[plain_name(name)] = _copied(found) if found is value and isinstance(value, torch.Tensor) else found
    return kept


def _add_rows(
    kept: dict[str, torch.Tensor],
    seen: dict[int, torch.Tensor],
    name: str,
    rows: RowRange,
    sharded: ShardedParam,
    *,
    leads: bool,
) -> None:
    """Puts a block of rows where it belongs in the matrix `name`, which its first block makes."""
    if id(sharded.param) in seen:
        # Another module has it, too.
        kept.update({name: seen[id(sharded.param)]} if leads else {})
        return
    values = sharded.read_live().view(sharded.shape)
    full = kept.get(name) if leads else values
    if full is None:
        full = kept[name] = torch.empty(rows.shape, dtype=values.dtype, device=HOST)
    seen[id(sharded.param)] = full
    if leads:
        full[rows.first : rows.end] = values


def _copied(buffer: torch.Tensor) -> torch.Tensor:
    return copy_of(buffer) if why_not_bytes(buffer) is None else buffer.detach().clone()


def refuse_custom_load(call: str, custom_load_fn: Any) -> None:
    """Raises ConfigError for a function of the caller's that would load: no rank has whole parameters for it."""
    if custom_load_fn is not None:
        raise ConfigError(
            f"{call}: custom_load_fn is not supported: call it inside "
            "zeroxide.zero.GatheredParameters(module.parameters(), modifier_rank=0)",
            path="custom_load_fn",
        )


def load_given_state_dict(
    module: nn.Module,
    context: ParameterContext,
    given: dict[str, Any],
    *,
    strict: bool,
    may_miss: Collection[str] = (),
) -> None:
    """As `load_full_state_dict`, also from {"module": a state dict}."""
    found = given["module"] if isinstance(given.get("module"), dict) else given
    load_full_state_dict(module, context, found, strict=strict, may_miss=may_miss)


def load_full_state_dict(
    module: nn.Module,
    context: ParameterContext,
    given: Mapping[str, Any],
    *,
    strict: bool,
    may_miss: Collection[str] = (),
) -> None:
    """Makes rank 0's `given` the weights and buffers. Every rank calls it; the others may give an empty dict.

    may_miss: names that need not be there, strict or not.

    Weights are taken as exact as they are given; optimizer state stays as it is. Raises ModelError on all ranks, before
    anything has changed, when names (`strict`) or shapes do not fit.
    """
    for unit in context.units:
        if unit.experts:
            raise ModelError(
                f"load_module_state_dict: {unit.name} has experts that are spread over ranks, which is not built: load "
                "a checkpoint, or load the state dict before zeroxide.initialize",
                name=unit.names[0],
            )
    targets = {
        own_name(name): value
        for name, value in _parameters_and_buffers(module).items()
        if isinstance(value, torch.Tensor)
    }
    given = _with_rows({plain_name(name): value for name, value in given.items()}, targets)
    found_problems = list(
        dict.fromkeys(_problems(context, targets, given, strict, {plain_name(name) for name in may_miss}))
    )
    said = [found_problems, [n for n in targets if n in given]]
    if context.whole.group is not None:
        said = context.whole.group.gather_objects(said, "whether a state dict fits")[0]
    problems, names = context.ranks.gather_objects(said)[0]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"load_module_state_dict: {problems[0]}{more}")
    done: set[int] = set()
    for name in names:
        target = targets[name]
        if id(target) in done:
            continue
        done.add(id(target))
        sharded = sharded_param_of(target)
        shape = target.shape if sharded is None else context.whole.shape(target, sharded.shape)
        dtype = _taken(target)
        if context.ranks.rank == 0 and context.whole.leads:
            found = in_host(given[name].detach())
            values = copy_of(found) if found.dtype == dtype else _rounded(found, dtype).contiguous()
        else:
            values = tensor_of(
                torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=HOST), dtype, shape
            )
        values = context.whole.part(target, values.contiguous())
        if context.ranks.world > 1:
            context.broadcast(values, 0, name)
        if sharded is None:
            set_buffer(module, target, values)
        else:
            sharded.write("weights", values.view(-1))


def _with_rows(given: dict[str, Any], targets: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What is given, in place of each matrix that is cut its blocks of rows under their own names."""
    found, cut = dict(given), set()
    for name, target in targets.items():
        rows, plain = rows_of(target), plain_name(name)
        if rows is None or plain not in given:
            continue
        cut.add(plain)
        values = given[plain]
        fits = isinstance(values, torch.Tensor) and tuple(values.shape) == rows.shape
        found[name] = values[rows.first : rows.end] if fits else values
    for plain in cut:
        del found[plain]
    return found


def _taken(target: torch.Tensor) -> torch.dtype:
    """The dtype in which a parameter or buffer takes new values: fp32 for exact weights, else its own."""
    sharded = sharded_param_of(target)
    if sharded is None:
        return target.dtype
    return torch.float32 if sharded.trainable else sharded.dtype


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return converted(values, dtype) if converts(values.dtype, dtype) else values.to(dtype)


def _fits(target: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether values of another dtype are taken: ordinary numbers by rounding, others where nothing is lost."""
    sharded, dtype = sharded_param_of(target), _taken(target)
    if sharded is not None and sharded.opaque:
        return values.dtype == dtype
    return (values.dtype in FLOATS and dtype in FLOATS) or holds_exactly(values.detach(), dtype)


def _problems(
    context: ParameterContext,
    targets: Mapping[str, torch.Tensor],
    given: Mapping[str, Any],
    strict: bool,
    may_miss: Collection[str],
) -> Iterator[str]:
    if strict:
        yield from (
            f"{plain_name(name)} is missing"
            for name in targets
            if name not in given and plain_name(name) not in may_miss
        )
        yield from (f"the model has no {name}" for name in given if name not in targets)
    for name, target in targets.items():
        if name in given:
            sharded = sharded_param_of(target)
            shape = target.shape if sharded is None else context.whole.shape(target, sharded.shape)
            got, rows = given[name], rows_of(target)
            if not isinstance(got, torch.Tensor) or got.shape != shape:
                what = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
                expected = tuple(shape) if rows is None else rows.shape
                yield f"{plain_name(name)}: expected shape {expected}, got {what}"
            elif (problem := why_not_bytes(got) or why_not_bytes(target)) is not None:
                yield f"{name} {problem}"
            elif not _fits(target, got):
                yield f"{name}: expected {_taken(target)}, got {got.dtype} with values that it does not hold"


def refuse_loading(module: nn.Module) -> list[Any]:
    """Makes `load_state_dict` of every module refuse to load into an engine's parameters. Returns their handles."""
    return [
        each.register_load_state_dict_pre_hook(Hook(_refuse))  # type: ignore[no-untyped-call]
        for each in module.modules()
        if each._parameters or blocks_of(each) is not None
    ]


def _refuse(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    blocks = blocks_of(module)
    own = [*module._parameters.items(), *([] if blocks is None else [("weight", blocks.first)])]
    for name, param in own:
        if param is None or prefix + name not in state_dict:
            continue
        handle = handle_of(param)
        if isinstance(handle, ShardedParam) and not handle.holds:
            raise ModelError(
                f"load_state_dict: {plain_name(handle.name)} has its values in an engine: call "
                "engine.load_module_state_dict, or load inside zeroxide.zero.GatheredParameters(params, "
                "modifier_rank=0)",
                name=handle.name,
            )

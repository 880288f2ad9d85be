"""The parameters of a model, and which of them form a unit: what is gathered and released together.

That is every item of the model's outermost module lists, and what is left over at the root. What is left over stays
gathered from the first forward to the end of backward when it is one unit; when it would exceed the unit budget it is
cut by owning module. Where there are very many small blocks, neighbours share a unit: each unit has disk transfers
and a frame of memory of its own, which a block of a few kilobytes is not worth. Over several ranks trainable and frozen
parameters are units apart, and everywhere those that are updated in different ways.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.device.placement import HOST
from zeroxide.errors import ModelError
from zeroxide.moe.routed import experts_apart
from zeroxide.params.empty import full_class
from zeroxide.params.handle import ManagedParameter, shape_of
from zeroxide.plan.checks import check_model
from zeroxide.plan.parameters import EXTERNAL, ParameterPlan
from zeroxide.plan.state import UNDECIDED, StatePlan
from zeroxide.precision.bits import ORDINARY
from zeroxide.rows import RowBlock

__all__ = ["LEAF", "STAND_IN", "UnitPlan", "blocks_in_lists", "called_modules", "find_units", "is_leaf"]

LEAF = "_z3_leaf"
"""The attribute of a module that is to be gathered whole, as DeepSpeed calls it."""

STAND_IN = "_stage_stand_in"
"""The attribute of a module that stands for a block which another rank of a pipeline has."""

DEFAULT_UNIT_BYTES = 512 << 20
"""What a unit may take where the config does not say."""

MANY = 128
"""Up to so many blocks are units of their own, however small they are."""


@dataclass
class UnitPlan:
    """One unit, needed by the forward of `modules`; a `held_through_backward` unit is held from its first use to the
    end of backward."""

    name: str
    modules: list[nn.Module]
    params: list[ParameterPlan]
    held_through_backward: bool = False
    state: StatePlan = UNDECIDED
    """How its trainable parameters are updated, and what state that takes."""
    experts: bool = False
    """Whether its parameters are those of experts that only some of the ranks have."""
    routed: bool = False
    """Whether it is one expert's, which is used only where a token goes to it."""

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(entry.numel for entry in self.params)

    @property
    def words(self) -> int:
        """What all parameters take, in elements of the compute dtype."""
        return sum(entry.words for entry in self.params)

    @property
    def trainable(self) -> int:
        """Elements of the parameters that require a gradient."""
        return sum(entry.numel for entry in self.params if entry.trainable)


def find_units(
    module: nn.Module,
    config: Config,
    compute: torch.dtype,
    *,
    world: int,
    states: Mapping[int, StatePlan],
    device: torch.device = HOST,
    experts: Container[int] = (),
) -> list[UnitPlan]:
    """The units of `module`, which computes on `device`, over `world` ranks.

    experts: ids of parameters of experts that only some of the ranks have. states: by the ids of trainable parameters,
    how each is updated; Adam in the config's format where it does not say.
    Raises ModelError for a model that cannot be trained.
    """
    entries = [
        replace(entry, expert=id(entry.param) in experts)
        for entry in _parameters_of(module, compute, cast=config.precision.asked)
    ]
    check_model(module, entries, config, device)
    unit_bytes = config.zeroxide.unit_bytes or DEFAULT_UNIT_BYTES
    routed, rows = _routed(module, config), _row_blocks(module)
    largest, frame = unit_bytes // compute.itemsize, _core.FRAME // compute.itemsize
    units = _gathered_together(module, entries, largest, frame, routed, rows)
    if world > 1:
        units = [part for unit in units for part in _by_trainable(unit)]
        units = [part for unit in units for part in _by_experts(unit)]
    default = StatePlan.default(config.precision.format, compute)
    return [part for unit in units for part in _by_state(unit, states, default)]


def _parameters_of(module: nn.Module, compute: torch.dtype, *, cast: bool) -> Iterator[ParameterPlan]:
    """Every parameter once, with all its owners, in the order of the first.

    cast: frozen parameters in fp32, bf16 and fp16 are to have the compute dtype, unless that is fp32.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, owner in module.named_modules():
        for name, param in owner._parameters.items():
            if param is None:
                continue
            owners.setdefault(id(param), []).append((prefix, owner))
            first.setdefault(id(param), (f"{prefix}.{name}" if prefix else name, param))
    for prefix, user in module.named_modules():
        for param in user.__dict__.get(EXTERNAL, ()):
            if id(param) in first and all(user is not owner for _, owner in owners[id(param)]):
                owners[id(param)].append((prefix, user))
    for key, (name, param) in first.items():
        shape = shape_of(param)
        # 4-bit weights, for one, lie in the words of any dtype.
        opaque = not param.requires_grad and full_class(param) not in (nn.Parameter, ManagedParameter)
        dtype = compute if param.requires_grad or (cast and not opaque and _is_cast(param, compute)) else param.dtype
        yield ParameterPlan(
            name=name,
            param=param,
            owners=tuple(owners[key]),
            shape=shape,
            numel=shape.numel(),
            trainable=param.requires_grad,
            dtype=dtype,
            words=-(-shape.numel() * dtype.itemsize // compute.itemsize),
            opaque=opaque,
        )


def _is_cast(param: nn.Parameter, compute: torch.dtype) -> bool:
    """Whether a frozen parameter takes the dtype of a bf16 or fp16 config, as DeepSpeed casts the module."""
    return compute is not torch.float32 and param.dtype in ORDINARY


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is marked to be gathered whole."""
    return bool(module.__dict__.get(LEAF))


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The items of the outermost module lists with at least two items that have parameters, and leaf modules."""
    if is_leaf(module):
        return
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if is_leaf(child):
            yield path, child
        elif isinstance(child, nn.ModuleList) and sum(1 for item in child if _is_block(item)) >= 2:
            yield from ((f"{path}.{index}", item) for index, item in enumerate(child) if _has_parameters(item))
        else:
            yield from _blocks(child, path)


def blocks_in_lists(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Of these blocks, those that are items of module lists."""
    lists = {id(item) for each in module.modules() if isinstance(each, nn.ModuleList) for item in each}
    return ((name, block) for name, block in _blocks(module) if id(block) in lists)


def _is_block(item: nn.Module | None) -> bool:
    """Whether an item of a module list counts: it has parameters, or has them on another rank."""
    return _has_parameters(item) or (item is not None and bool(item.__dict__.get(STAND_IN)))


def _has_parameters(module: nn.Module | None) -> bool:
    """Whether the item of a module list, which may be None, has any."""
    return module is not None and next(module.parameters(), None) is not None


def _routed(module: nn.Module, config: Config) -> dict[int, str]:
    """The experts that are used only where a token goes to them, by their ids, with their names.

    Raises ModelError for one that a leaf module is gathered with, or that the model has twice.
    """
    found: dict[int, str] = {}
    if config.zeroxide.unrouted_experts == "update":
        return found
    below = {id(each) for leaf in module.modules() if is_leaf(leaf) for each in leaf.modules()}
    for name, expert in experts_apart(module):
        if id(expert) in below or id(expert) in found:
            why = (
                "is below a leaf module, which is gathered whole" if id(expert) in below else f"is {found[id(expert)]}"
            )
            raise ModelError(f'zeroxide.unrouted_experts: {name} {why}: undo that, or use "update"', name=name)
        found[id(expert)] = name
    return found


def _row_blocks(module: nn.Module) -> dict[int, str]:
    """The blocks of rows of matrices that are cut, by their ids, with their names.

    Raises ModelError for one that a leaf module is gathered with.
    """
    found = {id(each): name for name, each in module.named_modules() if isinstance(each, RowBlock)}
    for leaf in filter(is_leaf, module.modules()) if found else ():
        for below in leaf.modules():
            if id(below) in found:
                name = found[id(below)]
                raise ModelError(
                    f"zeroxide.row_bytes: {name} is below a leaf module, which is gathered whole: undo that, or leave "
                    "the key out",
                    name=name,
                )
    return found


def _with_parts(
    module: nn.Module, blocks: list[tuple[str, nn.Module]], routed: dict[int, str]
) -> list[tuple[str, nn.Module]]:
    """The blocks and `routed`, the parts of some that are apart, in the order of the model: a part comes after the
    block that it is in."""
    if not routed:
        return blocks
    order = {id(each): number for number, each in enumerate(module.modules())}
    every = {id(each): (name, each) for name, each in blocks}
    for each in module.modules():
        if id(each) in routed:
            every[id(each)] = routed[id(each)], each
    return sorted(every.values(), key=lambda each: order[id(each[1])])


def _gathered_together(
    module: nn.Module,
    entries: list[ParameterPlan],
    max_elements: int,
    frame: int,
    routed: dict[int, str],
    rows: dict[int, str],
) -> list[UnitPlan]:
    """The parameters in units by where the model uses them. `max_elements`: of one unit; `frame`: what memory for
    gathered units is given out in. Both in elements of the compute dtype. `routed`: the experts that are units of their
    own, by their ids, with their names; `rows`: the same of blocks of rows."""
    apart = routed | rows
    blocks = _with_parts(module, list(_blocks(module)), apart)
    home: dict[int, int] = {}
    for index, (_, block) in sorted(enumerate(blocks), key=lambda each: id(each[1][1]) not in apart):
        for child in block.modules():
            home.setdefault(id(child), index)
    members: list[list[ParameterPlan]] = [[] for _ in blocks]
    left: list[ParameterPlan] = []
    for entry in entries:
        where = {home.get(id(owner)) for _, owner in entry.owners}
        only = next(iter(where))
        if len(where) == 1 and only is not None:
            members[only].append(entry)
        else:
            left.append(entry)
    units: list[UnitPlan] = []
    for (name, block), params in zip(blocks, members, strict=True):
        made = _block_units(name, block, params, max_elements)
        units += [replace(unit, routed=True) for unit in made] if id(block) in routed else made
    if len(units) > MANY:
        units = _joined(units, min(max_elements, frame))
    return [*_root_units(module, left, max_elements), *units]


def _joined(units: list[UnitPlan], most: int) -> list[UnitPlan]:
    """The same parameters in fewer units: small ones that follow one another in one module list become one."""
    joined: list[UnitPlan] = []
    for unit in units:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.words + unit.words <= most
            and _list_of(last) == _list_of(unit)
            and not any(_stays_alone(each) for each in (last, unit))
        ):
            first = last.name.partition(" to ")[0]
            joined[-1] = UnitPlan(f"{first} to {unit.name}", [*last.modules, *unit.modules], last.params + unit.params)
        else:
            joined.append(unit)
    return joined


def _stays_alone(unit: UnitPlan) -> bool:
    return unit.held_through_backward or unit.routed or any(map(is_leaf, unit.modules))


def _list_of(unit: UnitPlan) -> str:
    """The name of the module list whose item the unit, or the first block in it, is."""
    return unit.name.partition(" to ")[0].rpartition(".")[0]


def _block_units(name: str, block: nn.Module, params: list[ParameterPlan], max_elements: int) -> list[UnitPlan]:
    """One unit a block; cut by owning module where it is larger than a unit may be."""
    if not params:
        return []
    unit = UnitPlan(name, list(called_modules(block)), params)
    if unit.words <= max_elements or is_leaf(block):
        return [unit]
    return _by_owner(block, params)


def called_modules(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward runs when the block is used: itself, or its items where it is only a container."""
    if type(block).forward is nn.Module.forward and not is_leaf(block):
        for child in block.children():
            yield from called_modules(child)
    else:
        yield block


def _root_units(module: nn.Module, left: list[ParameterPlan], max_elements: int) -> list[UnitPlan]:
    if not left:
        return []
    owners = _distinct(owner for entry in left for _, owner in entry.owners)
    whole = UnitPlan("root", _distinct([module, *owners]), left, held_through_backward=True)
    if whole.words <= max_elements or is_leaf(module):
        return [whole]
    return _by_owner(module, left)


def _by_owner(block: nn.Module, params: list[ParameterPlan]) -> list[UnitPlan]:
    """One unit for the parameters of each module of `block`; a leaf module's are those of all modules below it."""
    above: dict[int, nn.Module] = {}
    for leaf in filter(is_leaf, block.modules()):
        for below in leaf.modules():
            above.setdefault(id(below), leaf)
    groups: dict[tuple[int, ...], list[ParameterPlan]] = {}
    for entry in params:
        users = _distinct(above.get(id(owner), owner) for _, owner in entry.owners)
        groups.setdefault(tuple(id(user) for user in users), []).append(entry)
    units = []
    for group in groups.values():
        owners = _distinct(above.get(id(owner), owner) for entry in group for _, owner in entry.owners)
        # Parameters with several owners may be used through any of them, also without its forward.
        units.append(
            UnitPlan(group[0].name.rpartition(".")[0] or "root", owners, group, held_through_backward=len(owners) > 1)
        )
    return units


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())


def _by_trainable(unit: UnitPlan) -> list[UnitPlan]:
    """The unit's trainable and its frozen parameters as units of the same modules."""
    parts = [
        (unit.name, [entry for entry in unit.params if entry.trainable]),
        (f"{unit.name} (frozen)", [entry for entry in unit.params if not entry.trainable]),
    ]
    if not all(params for _, params in parts):
        return [unit]
    return [replace(unit, name=name, params=params) for name, params in parts]


def _by_experts(unit: UnitPlan) -> list[UnitPlan]:
    """What all ranks have, and what only those with the same experts have, as units of the same modules."""
    shared = [entry for entry in unit.params if not entry.expert]
    experts = [entry for entry in unit.params if entry.expert]
    if not experts:
        return [unit]
    # The same words on every rank, whichever experts it has.
    apart = replace(unit, name=f"{unit.name} (experts)", params=experts, experts=True)
    return [replace(unit, params=shared), apart] if shared else [apart]


def _by_state(unit: UnitPlan, states: Mapping[int, StatePlan], default: StatePlan) -> list[UnitPlan]:
    """The unit's parameters as units of the same modules, one for each way in which they are updated.

    Frozen parameters are with the first part. states: by the parameters' ids; `default` for trainable parameters that
    it lacks, and where there are none.
    """
    parts: list[tuple[StatePlan, list[ParameterPlan]]] = []
    homes: list[int | None] = []
    for entry in unit.params:
        if not entry.trainable:
            homes.append(None)
            continue
        state = states.get(id(entry.param), default)
        at = next((number for number, (known, _) in enumerate(parts) if known.fits(state)), len(parts))
        if at == len(parts):
            parts.append((state, []))
        homes.append(at)
    if not parts:
        parts.append((default, []))
    for entry, home in zip(unit.params, homes, strict=True):
        parts[home or 0][1].append(entry)
    names = [unit.name, *(f"{unit.name} ({state.rule}, {state.format})" for state, _ in parts[1:])]
    return [
        replace(unit, name=name, params=params, state=state) for name, (state, params) in zip(names, parts, strict=True)
    ]

"""Which parameters form a unit: what is gathered and released together.

That is every item of the model's outermost module lists, and what is left over at the root. What is left over stays
gathered from the first forward to the end of backward when it is one unit; when it would exceed the unit budget it is
cut by owning module. Where there are very many small blocks, neighbours share a unit: each unit has disk transfers
and a frame of memory of its own, which a block of a few kilobytes is not worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from zeroxide.plan.parameters import ParameterPlan
from zeroxide.plan.state import UNDECIDED, StatePlan

__all__ = ["LEAF", "UnitPlan", "find_units", "is_leaf"]

LEAF = "_z3_leaf"
"""The attribute of a module that is to be gathered whole, as DeepSpeed calls it."""

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
        elif isinstance(child, nn.ModuleList) and sum(1 for item in child if _has_parameters(item)) >= 2:
            yield from ((f"{path}.{index}", item) for index, item in enumerate(child) if _has_parameters(item))
        else:
            yield from _blocks(child, path)


def _has_parameters(module: nn.Module | None) -> bool:
    """Whether the item of a module list, which may be None, has any."""
    return module is not None and next(module.parameters(), None) is not None


def find_units(module: nn.Module, entries: list[ParameterPlan], max_elements: int, frame: int) -> list[UnitPlan]:
    """The units of `module`. `max_elements`: of one unit; `frame`: what memory for gathered units is given out in. Both
    in elements of the compute dtype."""
    blocks = list(_blocks(module))
    home: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
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
        units += _block_units(name, block, params, max_elements)
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
            and not any(each.held_through_backward or any(map(is_leaf, each.modules)) for each in (last, unit))
        ):
            first = last.name.partition(" to ")[0]
            joined[-1] = UnitPlan(f"{first} to {unit.name}", [*last.modules, *unit.modules], last.params + unit.params)
        else:
            joined.append(unit)
    return joined


def _list_of(unit: UnitPlan) -> str:
    """The name of the module list whose item the unit, or the first block in it, is."""
    return unit.name.partition(" to ")[0].rpartition(".")[0]


def _block_units(name: str, block: nn.Module, params: list[ParameterPlan], max_elements: int) -> list[UnitPlan]:
    """One unit a block; cut by owning module where it is larger than a unit may be."""
    if not params:
        return []
    unit = UnitPlan(name, list(_called(block)), params)
    if unit.words <= max_elements or is_leaf(block):
        return [unit]
    return _by_owner(block, params)


def _called(block: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward runs when the block is used: itself, or its items where it is only a container."""
    if type(block).forward is nn.Module.forward and not is_leaf(block):
        for child in block.children():
            yield from _called(child)
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

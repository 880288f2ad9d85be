"""How ranks are grouped: `zeroxide.mesh` and `zero_optimization.zero_hpz_partition_size`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Count, Section
from zeroxide.config.given import Given
from zeroxide.errors import ConfigError

if TYPE_CHECKING:
    from zeroxide.config.sections.zero import ZeroSection

__all__ = ["Mesh", "MeshSection", "resolve"]

_MESH = "zeroxide.mesh"
_HPZ = "zero_optimization.zero_hpz_partition_size"


class MeshSection(Section):
    """`zeroxide.mesh`: sizes of the axes along which ranks are grouped. What is not named follows, or is 1."""

    dp_replicate: Count | None = None
    """Groups that each have all of the state."""
    dp_shard: Count | None = None
    """Ranks in a group, each of which has a shard."""
    pp: Count | None = None
    """Stages of a pipeline."""
    sp: Count | None = None
    """Ranks that share the sequences of a batch."""
    tp: Count | None = None
    """Ranks that share every matrix."""
    ep: Count | None = None
    """Ranks, of those that share a shard group, over which experts are spread."""


@dataclass(frozen=True)
class Mesh(Resolved):
    """Sizes of the axes of the process mesh, see `zeroxide.distributed.mesh`; all but `ep` multiply to the ranks."""

    key: ClassVar[str] = "zeroxide.mesh"

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def cuts_the_model(self) -> bool:
        """Whether ranks have different parts of the model, along `pp` or `tp`."""
        return self.pp * self.tp > 1

    def data_axes(self) -> Mesh:
        """The axes of the ranks that have one part of the model in common."""
        return dataclasses.replace(self, pp=1, tp=1)

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        shown = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard}
        shown |= {name: size for name in ("pp", "sp", "tp", "ep") if (size := getattr(self, name)) > 1}
        return {f"{self.key}.{name}": size for name, size in shown.items()}


def other_axes(section: MeshSection | None) -> dict[str, int]:
    """Sizes of the axes along which ranks do not take other samples: `pp`, `sp` and `tp`; and `ep`."""
    return {name: getattr(section, name, None) or 1 for name in ("pp", "sp", "tp", "ep")}


def batch_ranks(section: MeshSection | None, given: Given) -> int:
    """Ranks that take different samples: all of them, shared out to `pp`, `sp` and `tp`.

    Raises ConfigError when these do not divide the ranks.
    """
    sizes = {name: size for name, size in other_axes(section).items() if name != "ep" and size > 1}
    together = math.prod(sizes.values())
    if given.world_size % together:
        raise ConfigError(
            f"{_MESH}: {' * '.join(f'{name} {size}' for name, size in sizes.items())}"
            f"{f' = {together}' if len(sizes) > 1 else ''} does not divide the {given.world_size} ranks: make it "
            "a divisor of them, or start as many ranks as it divides",
            path=_MESH,
            expected=f"a divisor of {given.world_size}",
            got=str(together),
        )
    return given.world_size // together


def resolve(section: MeshSection | None, zero: ZeroSection | None, stage: int, given: Given) -> Mesh | None:
    """The axes that the two keys come to on the ranks; None for one shard group of all, or at stage 0 all as replicas.

    Where all weights travel as int8, `zero_hpz_partition_size` cuts a secondary partition instead: see
    `Zero.secondary`.

    Raises ConfigError when groups do not divide the ranks, when the axes do not multiply to them, and when a stage does
    not shard what is to be sharded in groups.
    """
    others = other_axes(section)
    hpz = None if zero is None else zero.zero_hpz_partition_size
    if others["sp"] > 1 and hpz is not None and hpz > 1:
        raise ConfigError(
            f"{_HPZ} = {hpz} with {others['sp']} ranks that share sequences: they belong to one shard group; name "
            f"{_MESH}.dp_shard, the shard groups' ranks over that",
            path=_HPZ,
            expected="1",
            got=str(hpz),
        )
    axes = _data_axes(section, zero, stage, batch_ranks(section, given))
    if axes is None and max(others.values()) == 1:
        return None
    if axes is None:
        ranks = batch_ranks(section, given)
        # Experts are spread within a shard group, also where every rank keeps all that it trains.
        axes = Mesh(dp_shard=ranks) if stage > 0 or others["ep"] > 1 else Mesh(dp_replicate=ranks)
    axes = dataclasses.replace(axes, **others)
    if axes.dp_shard * axes.sp % axes.ep:
        raise ConfigError(
            f"{_MESH}: ep = {axes.ep} does not divide dp_shard * sp = {axes.dp_shard * axes.sp}, the ranks over which "
            "experts are spread",
            path=f"{_MESH}.ep",
            expected=f"a divisor of {axes.dp_shard * axes.sp}",
            got=str(axes.ep),
        )
    return axes


def _data_axes(section: MeshSection | None, zero: ZeroSection | None, stage: int, world_size: int) -> Mesh | None:
    """The axes of `world_size` ranks that take different samples; None as `resolve` says."""
    hpz = None if zero is None else zero.zero_hpz_partition_size
    replicate = None if section is None else section.dp_replicate
    shard = None if section is None else section.dp_shard
    if hpz is not None and hpz > 1:
        if stage < 3:
            raise ConfigError(
                f"{_HPZ} = {hpz} needs zero_optimization.stage 3, got {stage}: below it every rank has all "
                "weights anyway",
                path=_HPZ,
                expected="1",
                got=str(hpz),
            )
        _check_divides(_HPZ, hpz, world_size)
        if zero is not None and zero.zero_quantized_weights:
            _check_alone(hpz, replicate, shard)
            return None
        if shard is not None and shard != hpz:
            raise ConfigError(
                f"{_HPZ} = {hpz} contradicts {_MESH}.dp_shard = {shard}: both are the ranks in a shard group",
                path=_HPZ,
            )
        shard = hpz
    if replicate is None and shard is None:
        return None
    if shard is not None and replicate is None:
        _check_divides(f"{_MESH}.dp_shard", shard, world_size)
        replicate = world_size // shard
    if replicate is not None and shard is None:
        _check_divides(f"{_MESH}.dp_replicate", replicate, world_size)
        shard = world_size // replicate
    assert shard is not None
    assert replicate is not None
    axes = Mesh(dp_replicate=replicate, dp_shard=shard)
    product = replicate * shard
    if product != world_size:
        raise ConfigError(
            f"{_MESH}: dp_replicate {replicate} * dp_shard {shard} = {product}, and there are {world_size} ranks: make "
            f"their product {world_size}, or name one of the two",
            path=_MESH,
            expected=f"a product of {world_size}",
            got=str(product),
        )
    _check_stage(axes, stage, other_axes(section))
    return axes if replicate > 1 and stage > 0 else None


def _check_alone(hpz: int, replicate: int | None, shard: int | None) -> None:
    if replicate is not None or shard is not None:
        raise ConfigError(
            f"{_HPZ} = {hpz} contradicts {_MESH}: with zero_quantized_weights a group of that key keeps codes of "
            "weights that all ranks shard; name one of the two",
            path=_HPZ,
        )


def _check_divides(path: str, size: int, world_size: int) -> None:
    if world_size % size:
        fitting = [str(each) for each in range(1, world_size + 1) if world_size % each == 0]
        near = fitting if len(fitting) <= 8 else [*fitting[:7], "..."]
        raise ConfigError(
            f"{path} = {size} does not divide the {world_size} ranks: use {_alternatives(near)}",
            path=path,
            expected=f"a divisor of {world_size}",
            got=str(size),
        )


def _alternatives(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def _check_stage(axes: Mesh, stage: int, others: dict[str, int]) -> None:
    if stage == 0 and axes.dp_shard > 1 and others["ep"] == 1:
        raise ConfigError(
            f"{_MESH}: dp_shard = {axes.dp_shard} needs zero_optimization.stage 1 to 3, got 0, which shards nothing",
            path=f"{_MESH}.dp_shard",
        )
    if stage > 0 and axes.dp_shard * others["sp"] == 1 and axes.dp_replicate > 1:
        raise ConfigError(
            f"{_MESH}: dp_shard = 1 keeps everything on each of {axes.dp_replicate} ranks: that is "
            f"zero_optimization.stage 0, got stage {stage}",
            path=f"{_MESH}.dp_shard",
        )

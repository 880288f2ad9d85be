"""What all ranks must know of all gradients before a step: their norm, whether one is not finite, which there are."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence, Set

import torch

from zeroxide import _core
from zeroxide.device.placement import HOST, of_buffer, spec
from zeroxide.distributed import Job, Ranks, UnitGroups, Watch
from zeroxide.errors import RanksError

__all__ = ["Apart", "Totals", "agree_on_norm"]

Totals = tuple[float, bool, int]
"""Sum of squares of all gradients, whether one is not finite, parameters that have one."""

Apart = Sequence[tuple[slice, tuple[int, ...]]]
"""Which trainable parameters, by their numbers, only some ranks train; and those ranks."""

PART = 1 << 20
"""Elements of a gradient that are squared at a time: of an embedding, all at once are 12 bytes for each element."""

_HEAD = struct.Struct("<d?d")
_COUNT = struct.Struct("<q")


def agree_on_norm(
    core: _core.Offload,
    job: Job,
    groups: UnitGroups,
    watch: Watch,
    clipping: float = 0.0,
    repeated: Set[tuple[int, int]] = frozenset(),
    apart: Apart = (),
) -> Totals:
    """The norm over all ranks; afterwards a parameter has been accumulated where it has on any rank.

    The sums over the slices of units are added in double precision in the order of the slices, so that every rank has
    the same bits, however ranks are grouped; then those of the parts of the model, in the order of the ranks that have
    them.

    clipping: the largest norm that this rank's script asks for; 0 for none. Raises RanksError on every rank where
    another rank's script asks for another, since each would update its shard by another factor.
    repeated: (unit, position) of parameters whose gradients other ranks have alike, which count them.
    """
    totals, parts = _of_one_part(core, job.ranks, groups, watch, clipping, repeated, apart), job.parts
    if parts.world == 1:
        return totals
    core.finish()
    payload = bytearray(_HEAD.pack(totals[0], totals[1], clipping) + _COUNT.pack(totals[2]))
    with watch.waiting("the gradient norm of all parts of the model"):
        rows = parts.gather_rows(of_buffer(payload, torch.uint8))
    every = [_HEAD.unpack(bytes(row[: _HEAD.size].tolist())) for row in rows]
    _check_clipping(every, parts)
    counts = [_COUNT.unpack(bytes(row[_HEAD.size :].tolist()))[0] for row in rows]
    return _sum(head[0] for head in every), any(head[1] for head in every), sum(counts)


def _of_one_part(
    core: _core.Offload,
    ranks: Ranks,
    groups: UnitGroups,
    watch: Watch,
    clipping: float,
    repeated: Set[tuple[int, int]],
    apart: Apart,
) -> Totals:
    total, nonfinite, accumulated = core.grad_norm()
    if repeated and not nonfinite:
        # Rounding may leave less than nothing.
        total = max(0.0, total - _squares(core, repeated))
    if ranks.world == 1:
        return total, nonfinite, accumulated
    # What another rank waits for must not wait for this exchange.
    core.finish()
    payload = bytearray(_HEAD.pack(total, nonfinite, clipping) + core.accumulated())
    with watch.waiting("the gradient norm"):
        rows = ranks.gather_rows(of_buffer(payload, torch.uint8))
    every = [_HEAD.unpack(bytes(row[: _HEAD.size].tolist())) for row in rows]
    _check_clipping(every, ranks)
    heads = [every[rank] for rank in groups.owners()]
    everywhere = _everywhere(rows[:, _HEAD.size :], apart)
    core.set_accumulated(bytes(everywhere.tolist()))
    return _sum(head[0] for head in heads), any(head[1] for head in heads), int(everywhere.sum())


def _everywhere(rows: torch.Tensor, apart: Apart) -> torch.Tensor:
    """Whether a parameter has been accumulated on any rank that trains it."""
    found = rows.amax(0)
    for which, ranks in apart:
        found[which] = rows[list(ranks), which].amax(0)
    return found


def _squares(core: _core.Offload, params: Set[tuple[int, int]]) -> float:
    """The sum of squares of the gradients of some parameters that this rank answers for."""
    found = 0.0
    for unit in sorted({unit for unit, _ in params}):
        for position, start, count in core.pieces(unit):
            if (unit, position) in params and count:
                for first in range(start, start + count, PART):
                    part = min(PART, start + count - first)
                    grad = torch.empty(part, dtype=torch.float32, device=HOST)
                    core.read_param(unit, position, "grad", first, spec(grad))
                    found += float(grad.double().square_().sum())
    return found


def _check_clipping(every: list[tuple[float, bool, float]], ranks: Ranks) -> None:
    for position, head in enumerate(every):
        if head[2] != every[0][2]:
            rank, first = ranks.number(position), ranks.number(0)
            raise RanksError(
                f"gradient clipping is {head[2]:g} on rank {rank} and {every[0][2]:g} on rank {first}: call "
                "engine.set_gradient_clipping alike on every rank",
                ranks=(rank,),
            )


def _sum(values: Iterable[float]) -> float:
    # Not the builtin: from Python 3.12 on that one compensates for rounding, and bits would depend on the version.
    total = 0.0
    for value in values:
        total += value
    return total

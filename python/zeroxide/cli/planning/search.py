"""The options that there are, the one that is recommended, and where none fits what is nearest.

Every option is worked out whatever the budgets are, and the best of those that fit is chosen by an order that no budget
is part of: so a larger budget never leads to a worse choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from zeroxide.cli.planning.estimate import Estimate
from zeroxide.cli.planning.request import OFFLOADS, Option, Request

__all__ = ["fastest", "fewest_blocks", "largest_batch", "nearest", "options", "recommended"]


def options(
    request: Request, formats: Sequence[str], *, blocks: int, early: Callable[[str], Sequence[bool]]
) -> list[Option]:
    """All of them. Where the host computes, nothing differs between `none` and `cpu`, and `cpu` stands for both.

    blocks: that can compute their activations again, all of them or none. early: whether backward updates, by where
    weights and state are.
    """
    offloads = [each for each in OFFLOADS if each != "none" or request.device is not None]
    if request.disk is None:
        offloads = [each for each in offloads if each in ("none", "cpu")]
    again = (0, blocks) if blocks else (0,)
    return [
        Option(offload, format, each, early=whether)
        for format in formats
        for offload in offloads
        for whether in early(offload)
        for each in again
    ]


ALIKE = 1.05
"""Times that differ by less may not differ: what was measured is not surer."""


def _order(estimate: Estimate) -> tuple[bool, int, int, int]:
    """Exact formats first, then time in steps of 5 %, then wear, then memory."""
    steps = math.floor(math.log(max(estimate.phases.total, 1e-9), ALIKE))
    return (not estimate.exact, steps, estimate.written, estimate.process)


def recommended(estimates: Sequence[Estimate]) -> Estimate | None:
    """The best that fits; None where none does."""
    return min((each for each in estimates if each.fits), key=_order, default=None)


def nearest(estimates: Sequence[Estimate]) -> Estimate | None:
    """The option that fits with the smallest larger host budget; None where something else is short in all of them."""
    others = [each for each in estimates if set(each.over) == {"host"}]
    return min(others, key=lambda each: (not each.exact, each.process), default=None)


def largest_batch(
    request: Request, work_out: Callable[[Request], Sequence[Estimate]]
) -> tuple[Estimate, int, int] | None:
    """What fits with a smaller micro-batch, else with shorter sequences: (its estimate, batch, sequence), or None.

    Where one sequence fits it is the largest number of them, below the request's, else the longest of 64 tokens and
    multiples of it. What is found fits, and one step more does not. The request itself does not fit.
    """
    batch, sequence = request.batch, request.sequence

    def tried(batch: int, sequence: int) -> Estimate | None:
        return recommended(work_out(replace(request, batch=batch, sequence=sequence)))

    if tried(1, sequence) is not None:
        most = _largest(1, batch, lambda count: tried(count, sequence) is not None)
        found = tried(most, sequence)
        return None if found is None else (found, most, sequence)
    step = 64
    if sequence <= step or tried(1, step) is None:
        return None
    most = _largest(1, max(2, sequence // step), lambda count: tried(1, count * step) is not None) * step
    found = tried(1, most)
    return None if found is None else (found, 1, most)


def fewest_blocks(count: int, lacks: Callable[[int], int]) -> int:
    """The fewest of 1 to `count` blocks to recompute with which nothing lacks: bytes that are short with so many,
    negative where some are left. None lack with `count`, and some with none; with what is returned none do, and with
    one less some do.

    Blocks mostly keep the same, so that between two known counts bytes are taken to lie on a line: few are tried.
    """
    least, most = 0, count
    known = {each: lacks(each) for each in (least, most)}
    while most - least > 1:
        line = known[least] / (known[least] - known[most])
        guess = min(most - 1, max(least + 1, least + math.ceil(line * (most - least))))
        known[guess] = lacks(guess)
        if known[guess] > 0:
            least = guess
        else:
            most = guess
    return most


def fastest(count: int, seconds: Callable[[int], float]) -> int:
    """The number from 0 to `count` with the fewest seconds, the smallest of several.

    Seconds fall and then rise, as where each more costs as much as the one before and what it saves ends somewhere:
    of two neighbours the one that takes fewer says on which side of them the fewest are.
    """
    least, most = 0, count
    while least < most:
        middle = (least + most) // 2
        if seconds(middle) <= seconds(middle + 1):
            most = middle
        else:
            least = middle + 1
    return least


def _largest(fits: int, too_large: int, check: Callable[[int], bool]) -> int:
    """The largest number that passes, by halving between one that does and one that does not."""
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if check(middle):
            fits = middle
        else:
            too_large = middle
    return fits

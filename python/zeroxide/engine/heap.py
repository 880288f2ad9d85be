"""How the memory of the process is set for an engine, beside what the engine reserves itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.errors import BudgetError
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan, make_plan

__all__ = ["plan_within", "prepare_heap"]

LARGE_BLOCK = 16 << 20
"""Bytes from which the allocator gives freed memory back when state is on disk: logits and their like."""


PASSING_BLOCK = 1 << 20
"""The same when activations are on disk or computed again. The allocator fills the holes that they leave with smaller
blocks, after which none is large enough for the next activation, and the heap grows by those that have gone."""


def prepare_heap(plan: Plan, config: Config) -> None:
    """Has memory that torch's tensors give back stay in the process, for the next step; pages of libraries that only
    importing has touched leave it. It holds for the process, and cannot be taken back."""
    largest = LARGE_BLOCK if Home.DISK in (plan.weights, plan.state) else None
    if config.activations.path is not None or plan.recompute.names:
        largest = PASSING_BLOCK
    if largest is None and config.zeroxide.accumulation_order == "layers":
        # Each micro-batch has a thread. Asked by another than the main one, the allocator has all share one heap:
        # what the threads of one step free serves those of the next.
        asking = threading.Thread(target=_core.keep_freed_memory, args=(None,))
        asking.start()
        asking.join()
    else:
        _core.keep_freed_memory(largest)
    if config.zeroxide.trim_libraries:
        _core.drop_clean_text()


def plan_within(resident: Callable[[], int], module: nn.Module, config: Config, **given: Any) -> Plan:
    """What `make_plan` plans beside what the process has resident now; where the budget has no room for that, beside
    what is left when pages of libraries that only importing has touched have gone, as they do while the engine is made.

    given: what else `make_plan` takes. Raises as it does.
    """
    try:
        return make_plan(module, config, resident=resident(), **given)
    except BudgetError:
        if not config.zeroxide.trim_libraries:
            raise
    _core.drop_clean_text()
    return make_plan(module, config, resident=resident(), **given)

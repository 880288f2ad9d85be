"""How the C allocator, which torch's tensors in host memory come from, is set for an engine."""

from __future__ import annotations

import threading

from zeroxide import _core
from zeroxide.config import Config
from zeroxide.plan.home import Home
from zeroxide.plan.plan import Plan

__all__ = ["keep_freed_memory"]

LARGE_BLOCK = 16 << 20
"""Bytes from which the allocator gives freed memory back when state is on disk: logits and their like."""


def keep_freed_memory(plan: Plan, config: Config) -> None:
    """Has freed memory stay in the process, for the next step. It holds for the process, and cannot be taken back."""
    if Home.DISK in (plan.weights, plan.state):
        _core.keep_freed_memory(LARGE_BLOCK)
        return
    if config.zeroxide.accumulation_order == "layers":
        # Each micro-batch has a thread. Asked by another than the main one, the allocator has all share one heap:
        # what the threads of one step free serves those of the next.
        asking = threading.Thread(target=_core.keep_freed_memory, args=(None,))
        asking.start()
        asking.join()
        return
    _core.keep_freed_memory(None)

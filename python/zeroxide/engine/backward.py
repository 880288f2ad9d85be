"""One backward of an engine's model, or a part of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from zeroxide.distributed import IDLE
from zeroxide.engine.parts import Parts

__all__ = ["run_backward"]

T = TypeVar("T")


def run_backward(parts: Parts, phase: str, run: Callable[[], T]) -> T:
    """What `run` returns, which calls autograd.

    Gradients are those of a loss that was divided by the accumulation steps, and scaled in fp16. phase: what other
    ranks are told that this one does.
    """
    parts.watch.doing = (phase, None, None, None)
    with parts.health.doing("backward ran"):
        parts.hooks.begin_backward()
        parts.accumulation.take_as_divided()
        try:
            found = run()
        except BaseException:
            parts.hooks.fail_backward()
            raise
        finally:
            parts.accumulation.divide_gradients()
        parts.hooks.end_backward()
    parts.watch.doing = IDLE
    return found

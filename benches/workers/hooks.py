"""Train GPT-2 for a few steps with a timer in every hook and report what share of a step they take: ../hook_time.py.

One argument: a JSON object

    {"model": "124m", "steps": 12, "offload": "none" | "nvme", "directory": where the blocks go, "threads": 1}

Run once a rank. Every other measured step goes without timers.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import gpt2
import process
import torch
from transformers import GPT2LMHeadModel

import zeroxide
from zeroxide.zero import hooks

WARM_UP = 2
HOOKS = ("_enter", "_before", "_after", "_leave", "begin_backward", "_before_backward", "end_backward")


class Clock:
    """Seconds inside hooks and, of those, inside the core. Hooks may call one another: the outermost counts."""

    def __init__(self) -> None:
        self.hooks = 0.0
        self.core = 0.0
        self.calls = 0
        self.depth = 0
        self.on = False

    def hook(self, call: Any) -> Any:
        """`call`, timed as a hook."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if not self.on or self.depth:
                return call(*arguments, **keywords)
            self.depth += 1
            self.calls += 1
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.hooks += time.perf_counter() - start
                self.depth -= 1

        return timed

    def inside(self, call: Any) -> Any:
        """`call`, timed as work of the core where a hook makes it."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if not self.on or not self.depth:
                return call(*arguments, **keywords)
            start = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self.core += time.perf_counter() - start

        return timed


class GradientHooks:
    """The hooks that take gradients. They are not Python's and time themselves; what they call is timed as work."""

    def __init__(self, reducer: Any, clock: Clock) -> None:
        self.hooks = [hook.func for _, hook in reducer.hooked]
        self.clock = clock
        reducer.complete = self._called(reducer.complete)
        reducer.check_open = self._called(reducer.check_open)

    def seconds(self) -> float:
        """Seconds so far in which neither the core nor a hook that is timed otherwise worked."""
        return sum(hook.seconds - hook.core_seconds for hook in self.hooks)

    def _called(self, call: Any) -> Any:
        def within(unit: Any) -> None:
            # Within a hook that times itself: only what the core does here is left to take off.
            self.clock.depth += 1
            try:
                call(unit)
            finally:
                self.clock.depth -= 1

        return within


class TimedCore:
    """The core with every method timed."""

    def __init__(self, core: Any, clock: Clock) -> None:
        for name in dir(core):
            if not name.startswith("_"):
                setattr(self, name, clock.inside(getattr(core, name)))


def main() -> None:
    spec = json.loads(sys.argv[1])
    clock = Clock()
    for name in HOOKS:
        setattr(hooks.Hooks, name, clock.hook(getattr(hooks.Hooks, name)))
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2.model_config(spec["model"]))
    offload = f"nvme:{spec['directory']}" if spec["offload"] == "nvme" else spec["offload"]
    engine, *_ = zeroxide.initialize(
        model=model,
        offload=offload,
        dtype="bf16",
        lr=1e-4,
        gradient_clipping=1.0,
        config={
            "zero_optimization": {"stage": 3},
            "zeroxide": {"threads": spec["threads"]},
            "steps_per_print": None,
        },
    )
    timed = TimedCore(engine.parts.core(), clock)
    gatherer = engine.parts.hooks.gatherer
    for owner in (gatherer, engine.parts.weights, engine.parts.reduction, engine.parts.hooks.reducer):
        owner.core = timed
    reducer = engine.parts.hooks.reducer
    reducer.large.core = timed
    gradients = GradientHooks(reducer, clock)
    plain, seen = [], []
    for step in range(WARM_UP + spec["steps"]):
        clock.on = step >= WARM_UP and step % 2 == 1
        before = clock.hooks - clock.core + gradients.seconds()
        batch = gpt2.batch(spec["model"], 1, 128, step * engine.world_size + engine.global_rank)
        engine.ranks.barrier()
        start = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.finish_step()
        seconds = time.perf_counter() - start
        if step >= WARM_UP:
            (seen if clock.on else plain).append((seconds, clock.hooks - clock.core + gradients.seconds() - before))
    engine.destroy()
    process.emit(
        {
            "step_seconds": [seconds for seconds, _ in plain],
            "hook_seconds": [inside for _, inside in seen],
            "hooks_a_step": round(clock.calls / max(1, len(seen))) + len(gradients.hooks),
        }
    )


if __name__ == "__main__":
    main()

"""How much of a step zeroxide's hooks spend in Python.

    python benches/hook_time.py --model 124m

One process, weights and state in host memory, or with --offload nvme on disk. Every entry that autograd or a module
calls (before and after forward, before backward, a gradient that arrived, the ends of passes) is timed from its first
line to its last; what it spends inside the Rust core, which holds no Python lock, is timed as well and taken off. The
timers themselves count as hooks, so the share printed is an upper bound. The steps are timed without them, in turns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import side_by_side as bench

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


class TimedCore:
    """The core with every method timed."""

    def __init__(self, core: Any, clock: Clock) -> None:
        for name in dir(core):
            if not name.startswith("_"):
                setattr(self, name, clock.inside(getattr(core, name)))


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.add_argument("--model", choices=("tiny", "124m", "355m"), default="124m")
    parser.add_argument("--offload", choices=("none", "nvme"), default="none")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, every other one with timers")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent / "workers"))

    import gpt2
    import torch
    from transformers import GPT2LMHeadModel

    import zeroxide
    from zeroxide.zero import hooks, reduce

    clock = Clock()
    for name in HOOKS:
        setattr(hooks.Hooks, name, clock.hook(getattr(hooks.Hooks, name)))
    reduce.Reducer._arrived = clock.hook(reduce.Reducer._arrived)  # type: ignore[method-assign]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2.model_config(options.model))
    offload = "none" if options.offload == "none" else f"nvme:{options.directory / 'hook-time'}"
    engine, *_ = zeroxide.initialize(model=model, offload=offload, dtype="bf16", lr=1e-4, gradient_clipping=1.0)
    timed = TimedCore(engine._core, clock)
    gatherer = engine._hooks.gatherer
    for owner in (gatherer, gatherer.exchange, engine._hooks.reducer, engine._hooks.reducer.large):
        owner.core = timed
    plain, seen = [], []
    for step in range(WARM_UP + options.steps):
        clock.on = step >= WARM_UP and step % 2 == 1
        before = clock.hooks - clock.core
        batch = gpt2.batch(options.model, 1, 128, step)
        start = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
        engine.finish_step()
        seconds = time.perf_counter() - start
        if step >= WARM_UP:
            (seen if clock.on else plain).append((seconds, clock.hooks - clock.core - before))
    engine.destroy()
    step_seconds = bench.summary(seconds for seconds, _ in plain)
    hook_seconds = bench.summary(inside for _, inside in seen)
    share = hook_seconds["median"] / step_seconds["median"]
    bench.emit("machine", bench.machine())
    bench.emit(
        "hook_time",
        {
            "model": options.model,
            "offload": options.offload,
            "hooks_a_step": round(clock.calls / max(1, len(seen))),
            "step_seconds": step_seconds,
            "hook_seconds": hook_seconds,
        },
    )
    bench.emit(
        "hook_time", bench.goal(f"Python time in hooks, share of a step, {options.model}", share, 0.01, at_most=True)
    )


if __name__ == "__main__":
    main()

"""A short training run in a process of its own, which shows what any run on this machine takes.

One argument, a JSON object; one line of JSON on standard output. It is {"error": line} where zeroxide refuses. Times
are those of the fastest step: what else the machine does only ever adds to one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from zeroxide.errors import ZeroxideError

__all__ = ["run_probe"]

_LAYERS, _WIDTH = 4, 2048
"""Of what is updated: 16.8 million parameters, in units of 4.2 million."""
_STEPS, _WARM = 5, 2


def run_probe(what: str, **given: Any) -> dict[str, Any]:
    """What the probe `what` sees: "process" or "update". Raises ZeroxideError for what it says, or that it ended."""
    command = [sys.executable, "-m", "zeroxide.cli.planning.probe", json.dumps({"what": what, **given})]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    if ended.returncode != 0 or not lines:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise ZeroxideError(f"measuring this machine ({what}): {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise ZeroxideError(f"measuring this machine ({what}): {found['error']}")
    return found


def _process(threads: int, width: int) -> dict[str, Any]:
    """A small language model trained as `zeroxide train` does: bytes beside its own, seconds of a pass."""
    import torch

    from zeroxide.cli.planning.passes import rehearse_training
    from zeroxide.cli.training.engine_setup import make_engine
    from zeroxide.cli.training.models import PRESETS, build_model, preset
    from zeroxide.cli.training.options import TrainOptions
    from zeroxide.device.placement import HOST

    torch.set_num_threads(threads)
    options = TrainOptions(offload="cpu", batch_size=2, seq_len=128, steps=8, threads=threads).checked()
    choice = preset("probe", {**PRESETS["tiny"], "vocab_size": 8192, "n_embd": width, "n_head": max(1, width // 64)})
    engine, _ = make_engine(options, choice, build_model(choice, torch.bfloat16), None)
    tokens = torch.zeros((options.batch_size, options.seq_len), dtype=torch.int64, device=HOST)
    seconds = []
    for _ in range(options.steps):
        begun = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        seconds.append(time.perf_counter() - begun)
        engine.step()
    process, payload = engine.memory()["process"], int(engine.plan().payload)
    engine.destroy()
    found = rehearse_training(choice, torch.bfloat16, options.batch_size, options.seq_len, checkpointing=False)
    return {
        "process_bytes": int(process["rss"]) - payload - found.peak,
        "peak_bytes": int(process["peak"]),
        "pass_seconds": min(seconds[_WARM:]),
    }


def _update(threads: int, offload: str, format: str) -> dict[str, Any]:
    """Steps of a stack of layers with next to nothing to compute: what its update takes, and moves over the disk."""
    import torch
    from torch import nn

    import zeroxide
    from zeroxide.device.placement import HOST

    torch.set_num_threads(threads)
    model = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS))
    stack = nn.Sequential(*model)
    engine, *_ = zeroxide.initialize(
        model=stack,
        lr=1e-4,
        dtype="bf16",
        offload=offload,
        config={"zeroxide": {"format": format, "threads": threads, "device": "cpu"}, "gradient_clipping": 1.0},
    )
    inputs = torch.ones((1, _WIDTH), dtype=torch.bfloat16, device=HOST)
    seconds, moved, worked = [], [], []
    for _ in range(_STEPS):
        engine.backward(engine(inputs).float().sum())
        before, used, begun = engine.io(), time.process_time(), time.perf_counter()
        engine.step()
        engine.finish_step()
        seconds.append(time.perf_counter() - begun)
        worked.append(time.process_time() - used)
        after = engine.io()
        moved.append(sum(after[key] - before[key] for key in ("read_bytes", "write_bytes")))
    engine.destroy()
    count = _LAYERS * _WIDTH * _WIDTH
    return {
        "seconds": min(seconds[_WARM:]),
        "processor_seconds": min(worked[_WARM:]),
        "bytes": moved[-1],
        "parameters": count,
    }


def main() -> None:
    """Does what the argument says."""
    given = json.loads(sys.argv[1])
    probes: dict[str, Callable[..., dict[str, Any]]] = {"process": _process, "update": _update}
    what = probes[given.pop("what")]
    try:
        found = what(**given)
    except ZeroxideError as error:
        found = {"error": error.message}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""How much of the disk's work a step of `zeroxide train` hides behind compute, with all state on disk.

    python benches/hidden_share.py --rounds 1                  1 B, 4 x 512
    python benches/hidden_share.py --size 124m --batch 8 --sequence 128

The disk is busy while a request is in flight; hidden is the busy time during which nobody waited for it. A perfect
overlap hides all of it, or, where the disk is busy for longer than the rest of the step takes, as much as that rest:
the share is hidden seconds over these. The first two steps of a run do not count: nothing is read ahead of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import side_by_side as bench
from plan_accuracy import run, text
from workers.gpt2 import SIZES

WARM_UP = 2
GOAL = 0.95


def overlap(step: dict[str, Any]) -> dict[str, float]:
    """Seconds of one step: the disk busy, waited for, hidden, and what a perfect overlap would have hidden."""
    busy, waited = step["io_busy_seconds"], step["io_wait_seconds"]
    hidden, possible = max(0.0, busy - waited), min(busy, step["seconds"] - waited)
    return {
        "seconds": step["seconds"],
        "busy_seconds": busy,
        "waited_seconds": waited,
        "hidden_of_busy": hidden / busy,
        "hidden_of_possible": hidden / possible,
    }


def steps_of(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The steps of one run that count."""
    model, out = folder / "model", folder / "run"
    model.mkdir(exist_ok=True)
    sizes = {"vocab_size": 50257, **SIZES[options.size], "n_positions": max(1024, options.sequence)}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes, **dropout}))
    words = ["train", "--model", str(model), "--offload", f"nvme:{folder / 'nvme'}", "--data", str(folder / "text.py")]
    words += ["--batch-size", str(options.batch), "--seq-len", str(options.sequence)]
    words += ["--steps", str(WARM_UP + options.steps), "--clip", str(options.clip)]
    words += ["--sample-tokens", "0", "--eval-batches", "1", "--trace", "none", "--out", str(out)]
    words += ["--host-memory", options.host_memory] if options.host_memory else []
    words += ["--activation-checkpointing"] if options.checkpointing else []
    run(words, dict(os.environ))
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    shutil.rmtree(folder / "nvme", ignore_errors=True)
    return [event for event in events if event["event"] == "step"][WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (default %(default)s)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens of each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="that count, in each round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs (default %(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest global norm; 0 for none (default %(default)s)")
    parser.add_argument("--host-memory", default=None, help="budget, as 4GiB (default: none)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    bench.scratch_argument(parser)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    bench.emit("hidden_share", bench.machine(options.directory))
    found: list[dict[str, float]] = []
    for at in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            text(Path(scratch))
            for step in steps_of(options, Path(scratch)):
                found.append(overlap(step))
                bench.emit("hidden_share", {"round": at + 1, "load": os.getloadavg()[0], **found[-1]})
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    goals = {"hidden_of_possible": {"at_least": GOAL, "got": round(medians["hidden_of_possible"], 4)}}
    bench.emit("hidden_share", {"size": options.size, "batch": options.batch, "sequence": options.sequence, **medians})
    bench.emit("hidden_share", {"goals": goals})


if __name__ == "__main__":
    main()

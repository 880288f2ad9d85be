"""How far what `zeroxide plan` says is from what `zeroxide train` then takes: memory, disk bytes, seconds by phase.

    python benches/plan_accuracy.py --rounds 2

Each case is planned and run right after, in processes of their own. Bytes hardly vary; seconds of both vary with what
else the machine does, so the machine is measured anew in each round, and figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import side_by_side as bench

CASES = {
    "124M, cpu, 1 x 128": ("gpt2", "cpu", 1, 128, "split", 0),
    "124M, nvme, 1 x 128": ("gpt2", "nvme", 1, 128, "split", 0),
    "124M, cpu, 4 x 256": ("gpt2", "cpu", 4, 256, "split", 0),
    "124M, nvme, 4 x 256, recompute 12": ("gpt2", "nvme", 4, 256, "split", 12),
    "124M, nvme, 1 x 128, fp32": ("gpt2", "nvme", 1, 128, "fp32", 0),
    "29M, cpu, 4 x 256": ("small", "cpu", 4, 256, "split", 0),
    "29M, nvme, 4 x 256": ("small", "nvme", 4, 256, "split", 0),
    "llama 58M, nvme, 2 x 256": ("llama", "nvme", 2, 256, "split", 0),
}
"""Name -> model, home, batch, sequence, format, blocks that are recomputed."""
MODELS: dict[str, dict[str, Any]] = {
    "small": {"model_type": "gpt2", "vocab_size": 8192, "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 1024},
    "llama": {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 9,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def made_models(folder: Path) -> dict[str, str]:
    """Model folders with nothing but a config."""
    found = {"gpt2": "gpt2"}
    for name, fields in MODELS.items():
        (folder / name).mkdir(exist_ok=True)
        extra = DROPOUT if fields["model_type"] == "gpt2" else {}
        (folder / name / "config.json").write_text(json.dumps({**fields, **extra}))
        found[name] = str(folder / name)
    return found


def run(words: list[str], environment: dict[str, str]) -> str:
    """Standard output of a command of zeroxide. Ends the benchmark where that fails."""
    command = [sys.executable, "-m", "zeroxide.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(words)}: {ended.stderr.strip()[-500:]}")
    return ended.stdout


def measured(
    case: tuple[Any, ...], models: dict[str, str], folder: Path, environment: dict[str, str], count: int
) -> dict[str, Any]:
    """Expected and took of one case."""
    model, home, batch, sequence, state_format, again = case
    disk = folder / "nvme"
    disk.mkdir(exist_ok=True)
    given = ["--batch", str(batch), "--sequence", str(sequence)]
    where = ["--disk", str(disk)] if home == "nvme" else []
    planned = json.loads(run(["plan", models[model], *given, *where, "--json"], environment))
    name = f"{home}, {state_format}" + (f", recompute {again}" if again else "")
    (each,) = [option for option in planned["options"] if option["option"]["name"] == name]
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    words = ["train", "--model", models[model], "--offload", f"nvme:{disk}" if home == "nvme" else home]
    words += ["--batch-size", str(batch), "--seq-len", str(sequence), "--steps", str(count), "--format", state_format]
    words += ["--sample-tokens", "0", "--eval-batches", "1", "--trace", "none", "--out", str(out)]
    words += ["--data", str(folder / "text.py"), "--recompute", str(again)]
    run(words, environment)
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (found,) = [event for event in events if event["event"] == "planned"]
    steps = [event for event in events if event["event"] == "step"][2:]
    took = {**found["took"]}
    for key, field in (("read", "read_bytes"), ("written", "write_bytes")):
        took[key] = statistics.median(step[field] for step in steps)
    expected = {**found["expected"], "step": each["phases"]["total"]}
    return {"expected": expected, "took": {**took, "step": statistics.median(step["seconds"] for step in steps)}}


def text(folder: Path) -> None:
    """A corpus of Python's own library, some hundred kilobytes."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    (folder / "text.py").write_text("\n".join(path.read_text(errors="replace") for path in sources))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="rounds (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of each run; the first two do not count")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    bench.scratch_argument(parser)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    bench.emit("plan_accuracy", bench.machine(options.directory))
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        folder = Path(scratch)
        text(folder)
        models = made_models(folder)
        for at in range(options.rounds):
            environment = {**os.environ, "ZEROXIDE_CACHE_DIR": str(folder / f"cache-{at}")}
            for name in options.case or CASES:
                each = measured(CASES[name], models, folder, environment, options.steps)
                found.setdefault(name, []).append(each)
                bench.emit("plan_accuracy", {"case": name, "round": at + 1, "load": os.getloadavg()[0], **each})
    off: dict[str, list[float]] = {}
    for name, rounds in found.items():
        row: dict[str, Any] = {"case": name}
        for key in rounds[0]["took"]:
            expected, took = (statistics.median(each[which][key] for each in rounds) for which in ("expected", "took"))
            ratio = took / expected if expected else None
            row[key] = {"expected": round(expected, 4), "took": round(took, 4), "ratio": ratio and round(ratio, 3)}
            if ratio is not None:
                off.setdefault(key, []).append(abs(ratio - 1))
        bench.emit("plan_accuracy", row)
    worst = {key: round(max(each), 3) for key, each in off.items()}
    goals = {"process": 0.05, "read": 0.0, "written": 0.0, "forward_and_update": 0.25, "backward": 0.25, "step": 0.25}
    bench.emit("plan_accuracy", {"goals": {key: {"at_most": goals[key], "got": worst[key]} for key in worst}})


if __name__ == "__main__":
    main()

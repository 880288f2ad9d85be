"""A model of many experts at home on disk, against the same model dense in memory: peak memory and bytes of a step.

Each side trains in a process of its own: "memory" is plain PyTorch with torch.optim.AdamW, where every expert runs and
is updated; the others are zeroxide with weights, gradients and state on disk, and `zeroxide.unrouted_experts` as they
are called. Peaks are VmHWM of the process. The units that a step has read or written are counted from a trace of it.

    python benches/routed_experts.py --hidden 1024 --features 4096 --layers 4 --path /mnt/nvme
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import zeroxide
from zeroxide.moe import MoE

SIDES = ("memory", "skip", "lazy", "update")


class Block(nn.Module):
    """A normalised layer of experts, beside what comes in."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(args.hidden)
        expert = nn.Sequential(nn.Linear(args.hidden, args.features), nn.GELU(), nn.Linear(args.features, args.hidden))
        options: dict[str, Any] = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(args.hidden, expert, args.experts, k=2, **options)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.moe(self.norm(hidden))[0]


class Model(nn.Module):
    """Words, blocks and a head."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.words = nn.Embedding(args.words, args.hidden)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.head = nn.Linear(args.hidden, args.words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


class Drawn:
    """The same weights on every side: of each parameter by its name."""

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        """What `zeroxide.initialize` asks of weights for a model on the meta device."""
        for name, tensor in tensors.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor.normal_(std=0.05, generator=generator)


def feed(args: argparse.Namespace) -> list[torch.Tensor]:
    """Few tokens a step: most experts have none."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, args.words, (1, args.tokens), generator=generator) for _ in range(args.steps)]


def in_memory(args: argparse.Namespace) -> dict[str, Any]:
    model, drawn = Model(args), Drawn()
    drawn.fill({name: param.data for name, param in model.named_parameters()}, {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    losses, seconds = [], []
    for ids in feed(args):
        start = time.perf_counter()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def on_disk(args: argparse.Namespace) -> dict[str, Any]:
    with torch.device("meta"):
        model = Model(args)
    disk = {"device": "nvme", "nvme_path": args.path}
    own = {"unrouted_experts": args.side, "gradients": "disk", "prefetch": 0, "staging_bytes": "16MiB"}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 1e-2}},
        "zero_optimization": {"stage": 3, "offload_param": disk, "offload_optimizer": disk},
        "gradient_clipping": 0.0,
        "zeroxide": {**own, "tile_bytes": "1MiB"},
        "steps_per_print": None,
    }
    engine, *_ = zeroxide.initialize(model=model, config=config, weights=Drawn())
    losses, seconds, moved, experts = [], [], [], []
    for ids in feed(args):
        before, start = engine.io(), time.perf_counter()
        path = Path(args.path) / "trace.json"
        with engine.trace(path):
            loss = engine(ids)
            engine.backward(loss)
            engine.step()
            engine.finish_step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        after = engine.io()
        moved.append(sum(after[key] - before[key] for key in ("read_bytes", "write_bytes")))
        events = json.loads(path.read_text())["traceEvents"]
        units = {each["args"]["unit"] for each in events if each["ph"] == "X" and each["name"] in ("read", "write")}
        experts.append(sum(".deepspeed_experts." in unit for unit in units))
    found = {"losses": losses, "seconds": seconds, "moved": moved, "experts": experts}
    engine.destroy()
    return found


def measured(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """What a process of its own finds."""
    given = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("side", "sides", "path")]
    with tempfile.TemporaryDirectory(dir=args.path) as folder:
        command = [sys.executable, __file__, *given, f"--side={side}", f"--path={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("hidden", 512), ("features", 2048), ("experts", 64), ("layers", 4), ("words", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--path", default=tempfile.gettempdir(), help="where the state is on disk")
    parser.add_argument("--sides", nargs="+", default=["memory", "skip", "lazy"], choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        found = in_memory(args) if args.side == "memory" else on_disk(args)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return
    every = {side: measured(args, side) for side in args.sides}
    base = every.get("memory")
    print("| | peak RSS, MiB | of dense in memory | bytes a step, MiB | experts read or written | seconds a step |")
    print("|---|---|---|---|---|---|")
    for side, found in every.items():
        ratio = f"{found['peak'] / base['peak']:.2f}" if base else ""
        moved, experts = found.get("moved"), found.get("experts")
        row = [
            side,
            f"{found['peak'] / 2**20:.0f}",
            ratio,
            f"{moved[-1] / 2**20:.1f}" if moved else "",
            f"{experts[-1]} of {args.experts * args.layers}" if experts else "",
            f"{sorted(found['seconds'])[len(found['seconds']) // 2]:.2f}",
        ]
        print("| " + " | ".join(row) + " |")
    print(json.dumps({"benchmark": "routed_experts", **vars(args), "sides": every, "torch": torch.__version__}))


if __name__ == "__main__":
    main()

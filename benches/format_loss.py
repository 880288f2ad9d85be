"""Losses of a small GPT whose optimizer state is kept in fewer bytes, beside other libraries' 8-bit optimizers.

    python benches/format_loss.py
    python benches/format_loss.py --steps 200 --seeds 1 --only split --only compact

A byte-level GPT of 1.0 M parameters learns the source text of Python's standard library: bf16 weights, gradients and
activations, AdamW, the same batches and initial weights for every contestant of a seed. Beside zeroxide's formats stand
torch's AdamW over fp32 master weights, and the 8-bit AdamW of bitsandbytes and torchao over the same, where they are
installed. One line a run: the mean loss of every twentieth of the steps, the loss of text that was left out, and the
bytes of weights and optimizer state for a parameter. Then the times of one step of the optimizer alone, all contestants
in turn within a round, as ratios to `split`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import side_by_side as bench

FORMATS = ("split", "fp32", "split-bf16", "compact")
PEERS = {"torch fp32": "torch", "bitsandbytes 8-bit": "bitsandbytes", "torchao 8-bit": "torchao"}
CONTESTANTS = (*PEERS, *FORMATS)
WIDTH, DEPTH, HEADS, ROWS, COLUMNS = 128, 5, 4, 8, 64
LR, WARMUP, CLIP = 2e-3, 100, 1.0
HELD_OUT_BATCHES = 64
TIMED_PARAMETERS, TIMED_ROUNDS = 4 << 20, 15


def text() -> tuple[Any, Any]:
    """The bytes to learn and those left out, as tensors: whole files, one in twenty left out."""
    import sysconfig
    from pathlib import Path

    import torch

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 20 == 0].append(path.read_bytes())
    learn, left = (torch.frombuffer(bytearray(b"\n".join(each)), dtype=torch.uint8) for each in parts)
    return learn, left


def make_model() -> Any:
    """The GPT, in bf16."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.heads, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, columns, _ = x.shape
            parts = self.heads(self.before(x)).view(rows, columns, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.between(x))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(COLUMNS, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
            self.norm = nn.LayerNorm(WIDTH)
            for each in (self.tokens, self.places):
                nn.init.normal_(each.weight, std=0.02)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            x = self.tokens(batch) + self.places.weight[: batch.shape[1]]
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.tokens.weight.T

    return Gpt().to(torch.bfloat16)


class Masters:
    """An optimizer of another library over fp32 master weights of bf16 parameters."""

    def __init__(self, parameters: list[Any], kind: Callable[..., Any], lr: float) -> None:
        self._parameters = parameters
        self._masters = [each.detach().float().requires_grad_() for each in parameters]
        self._optimizer = kind(self._masters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.param_groups = self._optimizer.param_groups

    def step(self) -> None:
        """Gradients up, the step, weights down."""
        import torch

        with torch.no_grad():
            for master, each in zip(self._masters, self._parameters, strict=True):
                master.grad = each.grad.float()
            self._optimizer.step()
            for master, each in zip(self._masters, self._parameters, strict=True):
                each.copy_(master)

    def state_bytes(self) -> int:
        """Master weights and state."""
        import torch

        total = sum(master.nbytes for master in self._masters)
        for state in self._optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.numel() > 1:
                    inner = getattr(value, "__tensor_flatten__", None)
                    names = inner()[0] if inner is not None else []
                    total += sum(getattr(value, name).nbytes for name in names) if names else value.nbytes
        return total


class Ours:
    """zeroxide's AdamW in a format."""

    def __init__(self, parameters: list[Any], format: str, lr: float) -> None:
        from zeroxide.optim import AdamW

        self._optimizer = AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, format=format, threads=1)
        self.param_groups, self.step = self._optimizer.param_groups, self._optimizer.step

    def state_bytes(self) -> int:
        """What the core holds beside the weights, without what pads small parameters to whole pages."""
        from zeroxide import _core

        rule = _core.Adam(
            lr=0.0, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, decoupled=True, bias_correction=True
        )
        format = self._optimizer._format
        block = sum(size for _, _, size, _ in _core.state_tensors(rule, format, "bfloat16")[1:])
        elements = (param.numel() for group in self.param_groups for param in group["params"])
        return sum(-(-count // 64) * block for count in elements)


def make_optimizer(name: str, parameters: list[Any], lr: float) -> Any:
    """The contestant's."""
    import torch

    if name in FORMATS:
        return Ours(parameters, name, lr)
    if name == "torch fp32":
        return Masters(parameters, torch.optim.AdamW, lr)
    if name == "torchao 8-bit":
        from torchao.optim import AdamW8bit

        return Masters(parameters, AdamW8bit, lr)
    from bitsandbytes.optim import AdamW8bit as OfBitsandbytes

    return Masters(parameters, OfBitsandbytes, lr)


def train(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One run."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = make_model()
    parameters = list(model.parameters())
    optimizer = make_optimizer(name, parameters, LR)
    learn, left = text()
    order = torch.Generator().manual_seed(1000 + seed)

    def loss_of(data: Any, generator: Any) -> Any:
        starts = torch.randint(0, data.numel() - COLUMNS - 1, (ROWS,), generator=generator)
        rows = torch.stack([data[start : start + COLUMNS + 1] for start in starts.tolist()]).long()
        scores = model(rows[:, :-1])
        return functional.cross_entropy(scores.flatten(0, 1).float(), rows[:, 1:].flatten())

    losses = []
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * (1.0 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(LR * share)
            else:
                group["lr"] = LR * share
        loss = loss_of(learn, order)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        for each in parameters:
            each.grad = None
        losses.append(loss.item())
    with torch.no_grad():
        fixed = torch.Generator().manual_seed(7)
        held_out = statistics.mean(loss_of(left, fixed).item() for _ in range(HELD_OUT_BATCHES))
    count = sum(each.numel() for each in parameters)
    part = max(1, steps // 20)
    return {
        "contestant": name,
        "seed": seed,
        "steps": steps,
        "parameters": count,
        "losses": [round(statistics.mean(losses[at : at + part]), 4) for at in range(0, steps, part)],
        "held_out": round(held_out, 5),
        "bytes_per_parameter": round(2 + optimizer.state_bytes() / count, 3),
    }


def times(names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """CPU seconds of one step of each optimizer over one large parameter, in turn; ratios to `split` of each round."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = {}
    for name in names:
        param = torch.nn.Parameter(torch.randn(TIMED_PARAMETERS // 1024, 1024).to(torch.bfloat16))
        param.grad = torch.randn_like(param)
        made[name] = make_optimizer(name, [param], 1e-3)
        for _ in range(2):
            made[name].step()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.process_time()
            made[name].step()
            taken[name].append(time.process_time() - start)
    return {
        name: {
            "ns_per_parameter": bench.summary([each / TIMED_PARAMETERS * 1e9 for each in taken[name]]),
            "to_split": bench.summary([a / b for a, b in zip(taken[name], taken["split"], strict=True)]),
        }
        for name in names
    }


def run_apart(name: str, seed: int, steps: int) -> dict[str, Any]:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--run", name, str(seed), str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contestant (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default %(default)s)")
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="which contestants (default all)")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "SEED", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, seed, steps = options.run
        print(json.dumps(train(name, int(seed), int(steps))))
        return
    bench.emit("machine", bench.machine())
    names = []
    for name in options.only or CONTESTANTS:
        if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
            bench.note(f"{name} is left out: {PEERS[name]} is not installed")
        else:
            names.append(name)
    work = [(name, seed) for seed in range(options.seeds) for name in names]
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda each: run_apart(*each, options.steps), work):
            bench.emit("format_loss", result)
    if "split" in names:
        for name, result in times(names, TIMED_ROUNDS).items():
            bench.emit("format_time", {"contestant": name, **result})


if __name__ == "__main__":
    main()

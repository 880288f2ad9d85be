"""What a training run did step by step, and how far another run of the same steps may be from it.

Runs are compared one step at a time, each from the same state: over many steps rounding differences grow as the model
pleases, over one step they are bounded. From the same weights a micro-batch gives the same bits of loss and gradients,
so all that may differ is the order in which gradients are summed and the way in which AdamW is evaluated.

The bound, element by element, with u = 2^-24, the unit roundoff of fp32:

    A    = sum over micro-batches and ranks of |g|, divided by the ranks where gradients are averaged
    k    = M (N + 1) roundings on the way of one gradient into the sum, for M micro-batches a rank over N ranks: each
           is divided or scaled once, passes N - 1 additions over ranks and one into what is there. DDP sends what is
           there through the next sum again; that, too, is at most M (N + 1).
    dg   = (k1 + k2) u A                         of the two sums
    dg  += |g| (|dg|_2 / |g|_2 + 6 u)            after clipping: the two norms differ, and each factor is rounded
    dm   = (1 - b1) dg + 8 u (b1 |m| + (1 - b1) |g|)
    dv   = (1 - b2) (2 |g| dg + dg^2) + 12 u v
    U    = s m / (sqrt(v) / c + e)               with m and v anywhere within dm and dv of their values
    dp   = (largest U - smallest U) + 16 u |U| + 6 u (|p| + |U|)

The roundings of AdamW itself are those of `tests/numerics/test_against_torch.py`, here on both sides.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from training import Case

State = dict[str, dict[str, torch.Tensor]]

UNIT = 2.0**-24
BETAS, EPS = (0.9, 0.999), 1e-8
SMALLEST = 2.0**-149


class Trace:
    """The trace of one run, in a folder that outlives its job. Every rank records; rank 0 writes."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "trace.pt"
        self.steps: list[dict[str, Any]] = []
        self.world = dist.get_world_size()
        self.micro_batches = 0

    @classmethod
    def load(cls, folder: str) -> Trace:
        trace = cls(folder)
        found = torch.load(trace.path)
        trace.steps, trace.world, trace.micro_batches = found["steps"], found["world"], found["micro_batches"]
        return trace

    # Recording --------------------------------------------------------------------------------------------------

    def watch(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Sums of |g| by parameter, which grow as gradients arrive."""
        sizes: dict[str, torch.Tensor] = {}

        def note(name: str, grad: torch.Tensor) -> None:
            sizes[name] = sizes.get(name, 0) + grad.detach().abs()

        for name, param in model.named_parameters():
            if param.requires_grad:
                param.register_hook(lambda grad, name=name: note(name, grad))
        self.shapes = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
        return sizes

    def begin(self, state: State) -> None:
        """The state before a step."""
        self.steps.append({"state": state, "updates": {}})

    def end(self, sizes: dict[str, torch.Tensor], *, mean: bool, norm: float, updates: dict[str, int]) -> None:
        """norm: of the gradient before clipping. updates: those that each parameter has had after the step."""
        total = {}
        for name, shape in self.shapes.items():
            total[name] = sizes[name].clone() if name in sizes else torch.zeros(shape)
            dist.all_reduce(total[name])
            total[name] /= self.world if mean else 1
        sizes.clear()
        self.steps[-1] |= {"sizes": total, "norm": norm, "updates": updates}

    def close(self, state: State, losses: list[float], micro_batches: int) -> None:
        """The state at the end, and this rank's losses."""
        self.micro_batches = micro_batches
        count = len(self.steps)
        self.steps.append({"state": state, "updates": self.steps[-1]["updates"]})
        for step in range(count):
            self.steps[step]["losses"] = by_number(losses[step * micro_batches : (step + 1) * micro_batches])
        if dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"steps": self.steps, "world": self.world, "micro_batches": micro_batches}
            torch.save(kept, self.path)
        dist.barrier()

    # Following --------------------------------------------------------------------------------------------------

    def before(self, step: int) -> State:
        """fp32 weights and moments before the step."""
        return self.steps[step]["state"]

    def updates(self, step: int) -> dict[str, int]:
        """Updates that each parameter has had before the step."""
        return self.steps[step - 1]["updates"] if step else {}

    def compare(
        self, step: int, state: State, losses: list[float], norm: float, worst: dict[str, float], case: Case
    ) -> None:
        """norm: of the gradient before clipping, which would hide a factor in all gradients.

        Notes in `worst` the largest difference to the trace after the step, in units of the bound."""
        roundings = self.micro_batches * (self.world + 1) + case.micro_batches * (dist.get_world_size() + 1)
        before, after = self.steps[step]["state"], self.steps[step + 1]["state"]
        sizes = {name: size.double() for name, size in self.steps[step]["sizes"].items()}
        mine = by_number(losses)
        apart = max(abs(a - b) for a, b in zip(mine, self.steps[step]["losses"], strict=True))
        worst["losses"] = max(worst.get("losses", 0.0), apart)
        b1, b2 = BETAS
        # The clipped gradient of the trace, from its moments: good to a few u of their terms, which the bound has.
        grads = {
            name: (after[name]["exp_avg"].double() - b1 * before[name]["exp_avg"].double()) / (1 - b1) for name in sizes
        }
        clipped = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        raw = {name: roundings * UNIT * size for name, size in sizes.items()}
        scale = 1.0 if case.clip is None else min(1.0, clipped / self.norm(step))
        error = math.sqrt(sum(each.square().sum().item() for each in raw.values()))
        off = error / self.norm(step)
        worst["norm"] = max(worst.get("norm", 0.0), abs(norm - self.norm(step)) / error)
        for name, parts in after.items():
            if name not in sizes or self.steps[step]["updates"].get(name, 0) == self.updates(step).get(name, 0):
                for part in parts:
                    if not torch.equal(state[name][part], parts[part]):
                        worst["untouched"] = math.inf
                continue
            p, g = before[name]["weights"].double(), grads[name]
            lr = 1e-3 if p.dim() > 1 else 3e-3
            t = self.steps[step]["updates"][name]
            dg = scale * raw[name] + g.abs() * (off + 6 * UNIT)
            m, v = after[name]["exp_avg"].double(), after[name]["exp_avg_sq"].double()
            dm = (
                (1 - b1) * dg + 8 * UNIT * (b1 * before[name]["exp_avg"].double().abs() + (1 - b1) * g.abs()) + SMALLEST
            )
            dv = (1 - b2) * (2 * g.abs() * dg + dg.square()) + 12 * UNIT * v + SMALLEST
            root, size = math.sqrt(1 - b2**t), lr / (1 - b1**t)

            def update(m: torch.Tensor, v: torch.Tensor, size: float = size, root: float = root) -> torch.Tensor:
                return size * m / (v.clamp_min(0).sqrt() / root + EPS)

            corners = torch.stack([update(m + i * dm, v + j * dv) for i in (-1, 1) for j in (-1, 1)])
            moved = update(m, v).abs()
            dp = corners.amax(0) - corners.amin(0) + 16 * UNIT * moved + 6 * UNIT * (p.abs() + moved)
            for part, bound in (("weights", dp), ("exp_avg", dm), ("exp_avg_sq", dv)):
                difference = (state[name][part].double() - parts[part].double()).abs()
                worst[part] = max(worst.get(part, 0.0), (difference / bound).max().item())
            # Of use only if it is far below what a step does.
            worst["looseness"] = max(worst.get("looseness", 0.0), (dp.median() / lr).item())

    def norm(self, step: int) -> float:
        """The gradient norm of the trace before clipping."""
        found: float = self.steps[step]["norm"]
        return found


def by_number(losses: list[float]) -> list[float]:
    """The losses of one step over all ranks, by the number of the micro-batch."""
    rows: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(rows, losses)
    return [row[micro] for micro in range(len(losses)) for row in rows]

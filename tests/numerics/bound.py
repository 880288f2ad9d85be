"""How far two right evaluations of AdamW may be apart."""

from __future__ import annotations

import math

import torch

UNIT = 2.0**-24
"""Unit roundoff of fp32: the largest relative error of one rounding."""
BETAS, EPS = (0.9, 0.999), 1e-8


class Bound:
    """How far two evaluations of AdamW in fp32 may be apart after the same gradients, element by element.

    u is the unit roundoff; every line counts the roundings of a plain fp32 evaluation (torch's: at most 4 in each
    moment, at most 8 in the update), each relative to the largest intermediate value. The gradient itself carries 3 u:
    the clip factor, rounded to fp32, and the product with it.

        a    = b1 a + (1 - b1) |g|               the size of the terms of m, which may cancel
        dm   = b1 dm + (4 + 3) u a               error of m
        dv   = b2 dv + (4 + 6) u v               error of v: all its terms are positive
        dU   = step (dm / d) + |U| (dv / 2v + 8 u)
        dp   = (1 - lr wd) dp + dU + 3 u (|p| + |U|)

    Both sides have this error against exact arithmetic, so they may differ by twice as much.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.m, self.v, self.a, self.dm, self.dv, self.dp = (torch.zeros(shape, dtype=torch.float64) for _ in range(6))
        self.t = 0

    def step(self, p: torch.Tensor, g: torch.Tensor, lr: float, decay: float) -> None:
        self.t += 1
        b1, b2 = BETAS
        g, p = g.double(), p.double()
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        self.a = b1 * self.a + (1 - b1) * g.abs()
        self.dm = b1 * self.dm + 7 * UNIT * self.a
        self.dv = b2 * self.dv + 10 * UNIT * self.v
        d = self.v.sqrt() / math.sqrt(1 - b2**self.t) + EPS
        size = lr / (1 - b1**self.t)
        update = size * self.m.abs() / d
        # Where v is 0 there is no error in it either. Subnormal moments round absolutely, by at most 2^-150.
        relative = torch.where(self.v > 0, self.dv / (2 * self.v.clamp_min(1e-300)), torch.zeros_like(self.v))
        change = size * (self.dm + 2.0**-149) / d + update * (relative + 8 * UNIT)
        self.dp = (1 - lr * decay) * self.dp + change + 3 * UNIT * (p.abs() + update)


def half_up(values: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16 as the exact formats round: ties towards larger magnitude."""
    bits = values.view(torch.int32).to(torch.int64)
    return ((bits + 0x8000) >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16()

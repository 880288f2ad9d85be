"""Cross-entropy over a large vocabulary that comes in chunks: `cuda/kernels/cross_entropy.cu`.

Of a chunk of logits nothing is kept but three numbers a row, and its gradients may take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p
from dataclasses import dataclass
from itertools import pairwise

import torch

from zeroxide.device.placement import address
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher
from zeroxide.kernels.launchers import kernels_for

__all__ = ["CASES", "KERNELS", "RowSums", "add_chunk", "gradient_reference", "gradient_to", "launcher_for", "reference"]

THREADS = 256

FORWARD = {dtype: Kernel("cross_entropy", f"zx_cross_entropy_{name}", THREADS) for dtype, name in FLOATS.items()}
BACKWARD = {
    dtype: Kernel("cross_entropy", f"zx_cross_entropy_gradient_{name}", THREADS) for dtype, name in FLOATS.items()
}
KERNELS = (*FORWARD.values(), *BACKWARD.values())


class _Forward(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("targets", c_void_p),
        ("largest", c_void_p),
        ("sum", c_void_p),
        ("target_logit", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("first", c_int64),
    )


class _Backward(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("gradients", c_void_p),
        ("targets", c_void_p),
        ("largest", c_void_p),
        ("sum", c_void_p),
        ("scale", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("first", c_int64),
    )


def launcher_for(logits: torch.Tensor) -> Launcher | None:
    """What `add_chunk` and `gradient_to` take for such logits; None where `launchers.kernels_for` says so."""
    dtype = logits.dtype
    return kernels_for(logits, FORWARD[dtype], BACKWARD[dtype]) if dtype in FLOATS else None


@dataclass(frozen=True)
class RowSums:
    """What is known of each row after some chunks, fp32 of shape (rows,): the largest logit, the sum of
    exp(logit - largest), and the target's logit once its chunk has come, else 0."""

    largest: torch.Tensor
    sum: torch.Tensor
    target_logit: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> RowSums:
        """Before the first chunk."""
        largest = torch.full((rows,), -torch.inf, device=device)
        return cls(largest, torch.zeros_like(largest), torch.zeros_like(largest))

    def losses(self, targets: torch.Tensor, ignore: int = -100) -> torch.Tensor:
        """The loss of each row after all chunks, fp32; 0 where the target is `ignore`."""
        # The difference first: both may be large.
        losses = (self.largest - self.target_logit) + self.sum.log()
        return torch.where(targets == ignore, torch.zeros_like(losses), losses)


def _check_chunk(call: str, logits: torch.Tensor, targets: torch.Tensor) -> None:
    check(call, "logits", logits, FLOATS)
    if logits.dim() != 2:
        expected, got = "2 dimensions", f"{logits.dim()} dimensions"
        raise TensorError(f"{call}: logits has {got}: expected {expected}", name="logits", expected=expected, got=got)
    check(call, "targets", targets, [torch.int64], like=logits, numel=logits.shape[0])


def add_chunk(launcher: Launcher, sums: RowSums, logits: torch.Tensor, first: int, targets: torch.Tensor) -> None:
    """Takes the logits of columns `first` on of the vocabulary into `sums`.

    logits: (rows, columns), contiguous, fp32, bf16 or fp16; computed in fp32. targets: int64, (rows,), counted in the
    vocabulary; one that is no column of any chunk has the logit 0. Raises TensorError.
    """
    _check_chunk("add_chunk", logits, targets)
    rows, width = logits.shape
    for name, tensor in (("largest", sums.largest), ("sum", sums.sum), ("target_logit", sums.target_logit)):
        check("add_chunk", name, tensor, [torch.float32], like=logits, numel=rows)
    kernel = FORWARD[logits.dtype]
    if not logits.numel():
        return
    if by_torch(launcher, kernel):
        _add_by_torch(sums, logits, first, targets)
    else:
        state = (address(sums.largest), address(sums.sum), address(sums.target_logit))
        args = _Forward(address(logits), address(targets), *state, rows, width, first)
        launcher.launch(kernel, blocks_for(rows, 1), bytes(args))


def gradient_to(
    launcher: Launcher,
    gradients: torch.Tensor,
    logits: torch.Tensor,
    first: int,
    targets: torch.Tensor,
    sums: RowSums,
    scale: torch.Tensor,
) -> None:
    """Writes the gradients of a chunk of logits: (softmax - [column is the target]) * scale, rounded once.

    gradients: as `logits`, which may be the same tensor. sums: of all chunks. scale: fp32, (rows,); a row of
    scale 0 has the gradient 0 whatever its logits are. The rest as `add_chunk` has it. Raises TensorError.
    """
    _check_chunk("gradient_to", logits, targets)
    rows, width = logits.shape
    check("gradient_to", "gradients", gradients, [logits.dtype], like=logits, numel=logits.numel())
    for name, tensor in (("largest", sums.largest), ("sum", sums.sum), ("scale", scale)):
        check("gradient_to", name, tensor, [torch.float32], like=logits, numel=rows)
    kernel = BACKWARD[logits.dtype]
    if not logits.numel():
        return
    if by_torch(launcher, kernel):
        gradients.copy_(_gradient_by_torch(logits, first, targets, sums, scale).view(gradients.shape))
    else:
        given = (address(each) for each in (logits, gradients, targets, sums.largest, sums.sum, scale))
        args = _Backward(*given, rows, width, first)
        launcher.launch(kernel, blocks_for(rows, 1), bytes(args))


def _base(largest: torch.Tensor) -> torch.Tensor:
    """What exponents of each row are taken relative to: 0 where all is minus infinity so far. (rows, 1)."""
    return torch.where(largest == -torch.inf, torch.zeros_like(largest), largest)[:, None]


def _add_by_torch(sums: RowSums, logits: torch.Tensor, first: int, targets: torch.Tensor) -> None:
    """`add_chunk` without a kernel."""
    values = logits.float()
    # A kernel's maximum passes a NaN over; it is in the sum.
    largest = torch.maximum(sums.largest.view(-1), values.masked_fill(values.isnan(), -torch.inf).amax(1))
    base = _base(largest)
    before = (sums.largest.view(-1, 1) - base).exp()[:, 0]
    total = sums.sum.view(-1) * before + (values - base).exp().sum(1)
    columns = targets.view(-1) - first
    here = (columns >= 0) & (columns < logits.shape[1])
    found = values.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    sums.sum.view(-1).copy_(total)
    sums.largest.view(-1).copy_(largest)
    sums.target_logit.view(-1).copy_(torch.where(here, found, sums.target_logit.view(-1)))


def _gradient_by_torch(
    logits: torch.Tensor, first: int, targets: torch.Tensor, sums: RowSums, scale: torch.Tensor
) -> torch.Tensor:
    """`gradient_to` without a kernel, as a new tensor."""
    probabilities = (logits.float() - _base(sums.largest.view(-1))).exp() / sums.sum.view(-1, 1)
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    differences = probabilities - (columns == targets.view(-1, 1)).float()
    scales = scale.view(-1, 1)
    return torch.where(scales == 0, torch.zeros_like(differences), differences * scales).to(logits.dtype)


def reference(logits: torch.Tensor, targets: torch.Tensor, ignore: int = -100) -> torch.Tensor:
    """Losses of whole rows as torch computes them, in double precision and then rounded to fp32."""
    losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none", ignore_index=ignore)
    return losses.float()


def gradient_reference(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradients of whole rows in double precision, rounded once to the logits' dtype."""
    gradients = logits.double().softmax(1)
    gradients[torch.arange(len(targets), device=logits.device), targets.clamp(min=0)] -= 1
    gradients = gradients * scale.double()[:, None]
    return torch.where(scale[:, None] == 0, torch.zeros_like(gradients), gradients).to(logits.dtype)


# Between double precision and fp32 there are, for each exponential, the rounding of logit - largest (2^-24 of some 16)
# and the error of expf (2 units of 2^-24); sums of n terms in 8 levels and 256 lanes add n / 2048 + 16 roundings.
FP32_TOLERANCE = 2.0**-24 * 64
# One rounding to the dtype of the gradients, relative to the largest of them.
TOLERANCES = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11 + FP32_TOLERANCE}


def _case(dtype: torch.dtype, kind: str) -> KernelCase:
    def make(n: int, device: torch.device) -> Inputs:
        width = 1 if n < 32 else 257 if n < 4000 else 2305 if n < 100_000 else 50_304
        rows = -(-n // width)
        logits = (4 * numbers(rows * width, 1, torch.float32, device)).to(dtype).view(rows, width)
        targets = torch.arange(rows, device=device) * 7919 % width
        targets[3::5] = -100
        edges = [0, width // 2 // 8 * 8, width * 7 // 8, width] if kind == "forward" else [0, width]
        return {"chunks": [logits[:, low:high].contiguous() for low, high in pairwise(edges)], "targets": [targets]}

    def scales(targets: torch.Tensor) -> torch.Tensor:
        return torch.where(targets < 0, 0.0, 0.5)

    def run(launcher: Launcher, inputs: Inputs) -> Sequence[torch.Tensor]:
        chunks, (targets,) = inputs["chunks"], inputs["targets"]
        sums, first = RowSums.empty(targets.numel(), targets.device), 0
        for chunk in chunks:
            add_chunk(launcher, sums, chunk, first, targets)
            first += chunk.shape[1]
        if kind == "forward":
            return [sums.losses(targets)]
        gradient_to(launcher, chunks[0], chunks[0], 0, targets, sums, scales(targets))
        return chunks

    def expected(inputs: Inputs) -> Sequence[torch.Tensor]:
        logits, (targets,) = torch.cat(list(inputs["chunks"]), 1), inputs["targets"]
        if kind == "forward":
            return [reference(logits, targets)]
        return [gradient_reference(logits, targets, scales(targets))]

    return KernelCase(
        name=f"cross_entropy_{kind}_{FLOATS[dtype]}",
        make=make,
        run=run,
        reference=expected,
        # Backward reads the logits twice, for their sums and for their gradients.
        moved=lambda n: n * dtype.itemsize * (1 if kind == "forward" else 3),
        tolerance=FP32_TOLERANCE if kind == "forward" else TOLERANCES[dtype],
    )


CASES = tuple(_case(dtype, kind) for dtype in FLOATS for kind in ("forward", "backward"))

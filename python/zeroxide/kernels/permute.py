"""Tokens to the order of their experts and back: `cuda/kernels/permute.cu`.

`gather_rows` permutes and is the gradient of `combine_rows` with respect to its rows (scaled by the weights);
`combine_rows` goes back and is, without weights, the gradient of `gather_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_int64, c_void_p

import torch

from zeroxide.device.placement import address
from zeroxide.errors import TensorError
from zeroxide.kernels.arguments import FLOATS, blocks_for, check
from zeroxide.kernels.case import Inputs, KernelCase, numbers
from zeroxide.kernels.fallback import by_torch
from zeroxide.kernels.launch import Kernel, Launcher

__all__ = [
    "CASES",
    "KERNELS",
    "combine_reference",
    "combine_rows",
    "expert_order",
    "gather_reference",
    "gather_rows",
]

THREADS = 256

GATHER = {dtype: Kernel("permute", f"zx_gather_rows_{name}", THREADS) for dtype, name in FLOATS.items()}
COMBINE = {dtype: Kernel("permute", f"zx_combine_rows_{name}", THREADS) for dtype, name in FLOATS.items()}
KERNELS = (*GATHER.values(), *COMBINE.values())


class _Gather(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("out", c_void_p),
        ("sources", c_void_p),
        ("scales", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
    )


class _Combine(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("out", c_void_p),
        ("positions", c_void_p),
        ("weights", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("ways", c_int64),
    )


def expert_order(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What puts tokens into the order of their experts.

    experts: int64, (tokens, ways), below zero where dropped. Gives `sources`, the token of each row in that order, and
    `positions`, (tokens, ways), where a token's rows are, -1 where dropped. Tokens of one expert keep their order.
    Dropped ones have no row.
    """
    flat = experts.reshape(-1)
    key = torch.where(flat < 0, torch.full_like(flat, torch.iinfo(torch.int64).max), flat)
    order = key.argsort(stable=True)
    kept = order[: int((flat >= 0).sum())]
    positions = torch.full_like(flat, -1)
    positions[kept] = torch.arange(kept.numel(), device=flat.device)
    return kept // experts.shape[1], positions.view_as(experts)


def _check_rows(call: str, rows: torch.Tensor) -> None:
    check(call, "rows", rows, FLOATS)
    if rows.dim() != 2:
        raise TensorError(
            f"{call}: rows has {rows.dim()} dimensions: expected 2",
            name="rows",
            expected="2 dimensions",
            got=f"{rows.dim()} dimensions",
        )


def gather_rows(
    launcher: Launcher, rows: torch.Tensor, sources: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Row `sources[i]` of `rows` as row `i`, times `scales[i]` in fp32 where they are given; zero for a source below 0.

    rows: (any, width), contiguous, fp32, bf16 or fp16. sources: int64, each below the number of rows, which is not
    checked. scales: fp32. Raises TensorError.
    """
    _check_rows("gather_rows", rows)
    check("gather_rows", "sources", sources, [torch.int64], like=rows)
    if scales is not None:
        check("gather_rows", "scales", scales, [torch.float32], like=rows, numel=sources.numel())
    kernel = GATHER[rows.dtype]
    if by_torch(launcher, kernel):
        return gather_reference(rows, sources.view(-1), None if scales is None else scales.view(-1))
    count, width = sources.numel(), rows.shape[1]
    out = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        where = None if scales is None else address(scales)
        args = _Gather(address(rows), address(out), address(sources), where, count, width)
        launcher.launch(kernel, blocks_for(count, 1), bytes(args))
    return out


def combine_rows(
    launcher: Launcher, rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """For each token the sum of its rows times their weights, in fp32 and in the order of its positions, rounded once.

    rows: (any, width), contiguous, fp32, bf16 or fp16. positions: int64, (tokens, ways), each below the number of rows,
    which is not checked; one below 0 adds nothing. weights: fp32, of the same shape. Raises TensorError.
    """
    _check_rows("combine_rows", rows)
    check("combine_rows", "positions", positions, [torch.int64], like=rows)
    if weights is not None:
        check("combine_rows", "weights", weights, [torch.float32], like=rows, numel=positions.numel())
    kernel = COMBINE[rows.dtype]
    if by_torch(launcher, kernel):
        return combine_reference(rows, positions, None if weights is None else weights.view(positions.shape))
    (tokens, ways), width = positions.shape, rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        where = None if weights is None else address(weights)
        args = _Combine(address(rows), address(out), address(positions), where, tokens, width, ways)
        launcher.launch(kernel, blocks_for(tokens, 1), bytes(args))
    return out


def gather_reference(rows: torch.Tensor, sources: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """What torch makes of the same."""
    found = rows[sources.clamp(min=0)] if rows.shape[0] else rows.new_zeros(sources.numel(), rows.shape[1])
    found = torch.where(sources[:, None] < 0, torch.zeros_like(found), found)
    return found if scales is None else (found.float() * scales[:, None]).to(rows.dtype)


def combine_reference(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """What torch makes of the same."""
    sums = rows.new_zeros(positions.shape[0], rows.shape[1], dtype=torch.float32)
    for way in range(positions.shape[1]):
        at = positions[:, way]
        if rows.shape[0]:
            terms = rows[at.clamp(min=0)].float()
            terms = terms if weights is None else terms * weights[:, way, None]
            sums = torch.where(at[:, None] < 0, sums, sums + terms)
    return sums.to(rows.dtype)


def _case(dtype: torch.dtype, kind: str, width: int) -> KernelCase:
    ways = 2

    def make(n: int, device: torch.device) -> Inputs:
        # Rows of all ways have n elements together.
        tokens = -(-n // (width * ways))
        experts = numbers(tokens * ways, 3, torch.float32, device).view(tokens, ways).mul(2).long() + 3
        experts[1::5, 0] = -1
        sources, positions = expert_order(experts)
        if kind.startswith("gather"):
            sources[::7] = -1
            rows, index = numbers(tokens * width, 1, dtype, device).view(tokens, width), sources
        else:
            rows, index = numbers(sources.numel() * width, 1, dtype, device).view(sources.numel(), width), positions
        scales = numbers(index.numel(), 4, torch.float32, device).view(index.shape)
        return {"rows": [rows], "index": [index], "scales": [scales]}

    kernel = gather_rows if kind.startswith("gather") else combine_rows
    expected = gather_reference if kind.startswith("gather") else combine_reference

    def given(inputs: Inputs) -> Sequence[torch.Tensor]:
        return (*inputs["rows"], *inputs["index"], *(() if kind == "gather" else inputs["scales"]))

    return KernelCase(
        name=f"{kind}_rows_{width}_{FLOATS[dtype]}",
        make=make,
        run=lambda launcher, inputs: [kernel(launcher, *given(inputs))],
        reference=lambda inputs: [expected(*given(inputs))],
        moved=lambda n: dtype.itemsize * (2 * n if kind.startswith("gather") else n + n // ways),
    )


CASES = (
    *(_case(dtype, kind, 64) for dtype in FLOATS for kind in ("gather", "gather_scaled", "combine")),
    _case(torch.bfloat16, "gather_scaled", 37),
    _case(torch.bfloat16, "combine", 37),
    _case(torch.bfloat16, "gather", 4096),
    _case(torch.bfloat16, "combine", 4096),
)

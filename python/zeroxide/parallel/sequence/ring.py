"""Ring attention (Liu et al. 2023) by torch's context parallel, for tensors in host memory.

Queries stay where they are, and keys and values go around; a rank merges what it has seen by the logarithms of the sums
of exponentials. It needs no heads to spread, so any number of ranks may share a sequence. torch's own
`context_parallel` knows the attention kernels of devices alone: for those in host memory its ring is called here with
the CPU's kernel. Parts are contiguous, so of a causal sequence the last rank has the most to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from zeroxide.device.placement import is_host
from zeroxide.errors import ModelError, TensorError
from zeroxide.parallel.sequence.exchange import EXCHANGES, gather_numbers
from zeroxide.parallel.sequence.parallel_state import known_state

__all__ = ["ring_attention"]


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: Any = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(query key^T * scale) value over all tokens of the group, for those of this rank: (batch, heads, tokens,
    size).

    query: (batch, heads, tokens, size) in host memory; key, value: the same, or with fewer heads that divide those of
    the query. Every rank has as many tokens, in the order of the ranks. group: ranks that share sequences, those of
    `initialize_sequence_parallel` if None. scale: 1 / sqrt(size) if None.

    Raises TensorError where shapes do not go together, on all ranks alike where those of ranks do not, and ModelError
    for tensors on a device and for a torch that has no ring.
    """
    group = known_state().sequence_group if group is None else group
    ring, back = _rings()
    if not is_host(query.device):
        raise ModelError(
            f"ring attention of tensors on {query.device} is not built: use "
            "torch.distributed.tensor.experimental.context_parallel around the model itself"
        )
    numbers = [*query.shape, key.shape[1], int(key.shape == value.shape), key.shape[2]]
    every = gather_numbers(group, numbers, query.device)
    if any(other != numbers for other in every) or not numbers[5] or query.shape[2] != key.shape[2]:
        raise TensorError(
            f"ring attention: query, key and value of the ranks are (batch, heads, tokens, size, key heads) {every}: "
            "expected as many tokens of each in every rank",
            name="query",
            expected=str(every[0]),
            got=str(numbers),
        )
    if query.shape[1] % key.shape[1]:
        raise TensorError(
            f"ring attention: {query.shape[1]} query heads over {key.shape[1]} key heads: expected a multiple",
            name="key",
            expected=f"a divisor of {query.shape[1]}",
            got=str(key.shape[1]),
        )
    EXCHANGES.count += 1
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    found: torch.Tensor = _Ring.apply(query, key, value, group, is_causal, scale, ring, back)
    return found


def _rings() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torch's ring, forward and backward, for any kernel."""
    try:
        from torch.distributed.tensor.experimental._context_parallel._attention import (
            _templated_ring_attention,
            _templated_ring_attention_backward,
        )
    except ImportError as error:
        raise ModelError(
            f"torch {torch.__version__} has no ring attention that is known here: use torch 2.15"
        ) from error
    return _templated_ring_attention, _templated_ring_attention_backward


@contextmanager
def _contiguous() -> Iterator[None]:
    """torch cuts sequences so that ranks have as much to do, unless it is told that they are cut in order."""
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

    before = _cp_options.enable_load_balance
    _cp_options.enable_load_balance = False
    try:
        yield
    finally:
        _cp_options.enable_load_balance = before


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        group: Any,
        is_causal: bool,
        scale: float | None,
        ring: Callable[..., Any],
        back: Callable[..., Any],
    ) -> torch.Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with _contiguous():
            output, sums = ring(
                *(group, 2, kernel, query, key, value, is_causal),
                dropout_p=0.0,
                scale=scale,
            )[:2]
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.group, ctx.is_causal, ctx.scale, ctx.back = group, is_causal, scale, back
        found: torch.Tensor = output
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, output, sums = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        with _contiguous():
            found = ctx.back(
                *(ctx.group, 2, kernel, gradient, "grad_out", query, key, value, output, sums, ctx.is_causal),
                dropout_p=0.0,
                scale=ctx.scale,
            )[:3]
        return (*found, None, None, None, None, None)

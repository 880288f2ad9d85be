"""Runs of a kernel's case on a GPU, between guards, beside the reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zeroxide.kernels import KernelCase, Launcher

GUARD = 256
PATTERN = 0xA5
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guards:
    """Copies of tensors on a device, with bytes before and behind them that nobody may write."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: list[tuple[torch.Tensor, int, int]] = []

    def copy(self, tensor: torch.Tensor, shift: int) -> torch.Tensor:
        """A copy whose address is `shift` elements behind a multiple of 256 bytes."""
        start = GUARD + shift * tensor.element_size()
        nbytes = tensor.numel() * tensor.element_size()
        memory = torch.full((start + nbytes + GUARD,), PATTERN, dtype=torch.uint8, device=self.device)
        # A view of bytes as larger elements begins at a multiple of their size in its storage, as this one does.
        inside = memory[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        self.made.append((memory, start, start + nbytes))
        return inside

    def intact(self) -> bool:
        return all(bool((m[:a] == PATTERN).all()) and bool((m[b:] == PATTERN).all()) for m, a, b in self.made)


def differs(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """How an output is not the reference's, or None. Every NaN is equal to every other."""
    got, expected = got.cpu(), expected.cpu()
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return f"{got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if got.is_floating_point() and tolerance:
        finite = expected.double()[expected.isfinite()]
        bound = tolerance * float(finite.abs().max()) if finite.numel() else 0.0
        ok = torch.isclose(got.double(), expected.double(), rtol=0, atol=bound, equal_nan=True)
    else:
        integer = INTEGERS[got.element_size()]
        ok = got.contiguous().view(integer) == expected.contiguous().view(integer)
        if got.is_floating_point():
            ok |= got.isnan() & expected.isnan()
    if bool(ok.all()):
        return None
    at = int((~ok).view(-1).nonzero()[0])
    wrong = int((~ok).sum())
    return f"{wrong} of {ok.numel()} elements, first {at}: {got.view(-1)[at].item()} for {expected.view(-1)[at].item()}"


def problem(
    case: KernelCase,
    n: int,
    launcher: Launcher,
    device: torch.device,
    shift: int = 0,
    change: Callable[[dict], None] | None = None,
) -> str | None:
    """What is wrong with a case of `n` elements on the device, in a few words, or None.

    change: is given the inputs before anything is run, to put special values there.
    """
    made = case.make(n, torch.device("cpu"))
    if change is not None:
        change(made)
    expected = case.reference(made)
    guards = Guards(device)
    inputs = {name: [guards.copy(each, shift) for each in tensors] for name, tensors in made.items()}
    got = case.run(launcher, inputs)
    torch.cuda.synchronize(device)
    if not guards.intact():
        return "wrote outside of its tensors"
    if len(got) != len(expected):
        return f"{len(got)} outputs, expected {len(expected)}"
    found = [differs(*both, case.tolerance) for both in zip(got, expected, strict=True)]
    wrong = [f"output {at}: {each}" for at, each in enumerate(found) if each is not None]
    return "; ".join(wrong) or None

"""What the engine on a device will rely on: a storage that is emptied and filled again under autograd's saved views."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def losses(model, flat, device, between):
    """Loss and gradients of a model whose parameters are views of `flat`; `between` runs before backward."""
    torch.manual_seed(3)
    x = torch.randn(16, 64, device=device)
    loss = model(x).square().mean()
    between()
    loss.backward()
    return float(loss.detach()), [param.grad.clone() for param in model.parameters()]


def viewed(device):
    """A model and the one flat tensor that its parameters are views of."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64)).to(device)
    params = list(model.parameters())
    flat = torch.cat([param.detach().view(-1) for param in params])
    at = 0
    for param in params:
        param.data = flat[at : at + param.numel()].view(param.shape)
        at += param.numel()
    return model, flat


@pytest.mark.parametrize("elsewhere", [False, True])
def test_saved_views_see_a_storage_that_was_emptied_and_filled_again(device, elsewhere):
    """Catches: a saved view that keeps the old memory, one that refuses the new, memory that is not given back."""
    model, flat = viewed(device)
    expected = losses(model, flat, device, lambda: None)
    model, flat = viewed(device)
    kept = flat.to("cpu", copy=True)
    nbytes = flat.untyped_storage().nbytes()
    taken = []

    def empty_and_fill():
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        flat.untyped_storage().resize_(0)
        assert before - torch.cuda.memory_allocated(device) >= nbytes
        if elsewhere:
            # Somebody takes the place, so that the new memory is at another address.
            taken.append(torch.full((flat.numel(),), 7.0, device=device))
        flat.untyped_storage().resize_(nbytes)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(flat):
            flat.copy_(kept)

    got = losses(model, flat, device, empty_and_fill)
    assert got[0] == expected[0]
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(got[1], expected[1], strict=True))


def test_parameters_follow_the_storage(device):
    model, flat = viewed(device)
    first = next(model.parameters())
    nbytes = flat.untyped_storage().nbytes()
    flat.untyped_storage().resize_(0)
    taken = torch.empty(nbytes, dtype=torch.uint8, device=device)
    flat.untyped_storage().resize_(nbytes)
    assert first.data_ptr() == flat.data_ptr() != taken.data_ptr()

"""Weights that were mapped from a file leave the process as they are taken over, and are not lost by that."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from running import started
from torch import nn

LAYERS, WIDTH = 8, 512


def resident(path):
    """Resident bytes of the mapping of a file."""
    found, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *rest = line.split()
            if "-" in first:
                inside = bool(rest) and rest[-1] == str(path)
            elif inside and first == "Rss:":
                found += int(rest[0]) << 10
    return found


@pytest.fixture
def mapped(tmp_path):
    """(path, a model whose weights are parts of one private mapping of it, the whole mapping)."""
    path = tmp_path / "weights"
    torch.manual_seed(0)
    path.write_bytes(torch.randn(LAYERS * WIDTH * WIDTH).numpy().tobytes())
    whole = torch.from_file(str(path), shared=False, size=LAYERS * WIDTH * WIDTH)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    for layer, part in zip(model, whole.view(LAYERS, WIDTH, WIDTH), strict=True):
        layer.weight = nn.Parameter(part)
    return path, model, whole


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_pages_of_the_file_leave_with_the_weights(mapped, tmp_path, offload):
    """The mapping itself stays, as somebody has it. Catches: pages that stay until the last tensor of a file is gone,
    which is the whole model beside its state."""
    path, model, whole = mapped
    expected = whole.clone()
    assert resident(path) == whole.nbytes
    home = f"nvme:{tmp_path / 'disk'}" if offload == "nvme" else offload
    with started(model, lr=1e-3, offload=home) as engine:
        assert resident(path) == 0
        found = torch.cat([value.flatten() for value in engine.module_state_dict().values()])
    assert torch.equal(found, expected)
    assert torch.equal(whole, expected)
    assert resident(path) == whole.nbytes


def test_what_was_changed_after_loading_stays(mapped):
    """Pages that were written to are no longer the file's. Catches: all pages dropped, which puts the file's values
    back."""
    _, model, whole = mapped
    with torch.no_grad():
        model[2].weight[100].fill_(7.0)
        whole[-1] = 9.0
    expected = whole.clone()
    with started(model, lr=1e-3) as engine:
        found = torch.cat([value.flatten() for value in engine.module_state_dict().values()])
    assert torch.equal(found, expected)
    assert torch.equal(whole, expected)


def test_locked_weights_stay_where_they_are(mapped):
    """Of a mapping that is shared with the file: the kernel drops no locked page, and says so. Catches: an engine that
    cannot be made over them."""
    path, model, whole = mapped
    whole = torch.from_file(str(path), shared=True, size=whole.numel())
    for layer, part in zip(model, whole.view(LAYERS, WIDTH, WIDTH), strict=True):
        layer.weight = nn.Parameter(part)
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p(whole.data_ptr()), ctypes.c_size_t(whole.nbytes)
    if libc.mlock(address, size) != 0:
        pytest.skip(f"memory cannot be locked here: {os.strerror(ctypes.get_errno())}")
    try:
        expected = whole.clone()
        with started(model, lr=1e-3) as engine:
            found = torch.cat([value.flatten() for value in engine.module_state_dict().values()])
        assert torch.equal(found, expected)
    finally:
        libc.munlock(address, size)


def test_a_frozen_and_a_transposed_weight(mapped):
    """Frozen weights go the same way; what is not contiguous is copied first. Catches: bytes of another order."""
    _, model, whole = mapped
    model[0].weight.requires_grad_(False)
    model[1].weight = nn.Parameter(whole.view(LAYERS, WIDTH, WIDTH)[1].t())
    expected = [each.detach().clone() for each in model.parameters()]
    with started(model, lr=1e-3) as engine:
        found = list(engine.module_state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

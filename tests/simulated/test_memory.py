"""Device memory: poisoned before its first use, given out again in the order of streams, counted."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

LATE = 100_000


def found(sim):
    return {(each.first, each.second) for each in sim.races()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8])
def test_fresh_memory_is_poisoned(sim, dtype):
    fresh = torch.empty(1000, dtype=dtype, device="sim")
    assert (fresh.isnan() if dtype.is_floating_point else fresh == 255).all().item()


def test_memory_that_was_used_is_poisoned_again(sim):
    first = torch.ones(5000, device="sim")
    address = first.data_ptr()
    del first
    again = torch.empty(5000, device="sim")
    assert again.data_ptr() == address
    assert again.isnan().all().item()


def test_a_storage_goes_and_comes_back_under_its_views(sim):
    layer, x = nn.Linear(8, 8).to("sim"), torch.rand(3, 8, device="sim", requires_grad=True)
    values, storage = layer.weight.detach().clone(), layer.weight.untyped_storage()
    layer(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    y = layer(x).sum()
    in_use = sim.memory_allocated()
    storage.resize_(0)
    assert sim.memory_allocated() == in_use - 512
    for use in (layer.weight.add, layer.weight.data.copy_, values.copy_, layer.weight.cpu):
        with pytest.raises(RuntimeError, match="lies outside of its storage, which has 0 bytes: has it been released"):
            use(*() if use == layer.weight.cpu else (layer.weight,))
    storage.resize_(8 * 8 * 4)
    assert layer.weight.isnan().all().item()
    layer.weight.data.copy_(values)
    y.backward()
    assert x.grad.equal(expected)
    assert sim.races() == []


def test_a_storage_that_grows_keeps_its_values(sim):
    values = torch.arange(10.0, device="sim")
    values.untyped_storage().resize_(80)
    assert values.cpu().equal(torch.arange(10.0))
    assert torch.empty(0, device="sim").set_(values.untyped_storage(), 10, (10,)).isnan().all().item()
    values.resize_(4, 10)
    assert values.shape == (4, 10)
    assert values[0].cpu().equal(torch.arange(10.0))


def use_on_another_stream(sim, *, recorded):
    """A tensor that is freed while another stream has yet to copy from it, and memory that is taken right after."""
    sim.set_delay(LATE, LATE)
    side, host = torch.Stream("sim"), torch.empty(5000).pin_memory()
    used = torch.ones(5000, device="sim")
    address = used.data_ptr()
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        host.copy_(used, non_blocking=True)
    if recorded:
        used.record_stream(side)
    del used
    taken = torch.zeros(5000, device="sim")
    side.synchronize()
    return host, taken.data_ptr() == address


def test_memory_that_is_freed_too_early(sim):
    host, same = use_on_another_stream(sim, recorded=False)
    assert same
    assert not host.equal(torch.ones(5000))
    assert ("copy down", "free") in found(sim)


def test_memory_whose_use_is_recorded(sim):
    host, same = use_on_another_stream(sim, recorded=True)
    assert not same
    assert host.equal(torch.ones(5000))
    assert sim.races() == []
    assert torch.empty(5000, device="sim").isnan().all().item()


def test_memory_may_be_freed_first_and_waited_for_then(sim):
    """What counts is that its stream has waited when it is asked for memory again."""
    sim.set_delay(LATE, LATE)
    side, host = torch.Stream("sim"), torch.empty(5000).pin_memory()
    used = torch.ones(5000, device="sim")
    address = used.data_ptr()
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        host.copy_(used, non_blocking=True)
    del used
    torch.accelerator.current_stream().wait_stream(side)
    assert torch.zeros(5000, device="sim").data_ptr() == address
    side.synchronize()
    assert host.equal(torch.ones(5000))
    assert sim.races() == []


def test_any_allocation_may_take_what_was_freed(sim):
    """Whether it has in this run is left to chance, or to sizes."""
    side, host = torch.Stream("sim"), torch.empty(5000).pin_memory()
    used = torch.ones(5000, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        host.copy_(used, non_blocking=True)
    del used
    torch.empty(1, device="sim")
    assert found(sim) == {("copy down", "free")}


def test_memory_whose_recorded_use_has_ended_unseen_by_the_host(sim):
    """The allocator has seen it, which orders this memory and nothing else."""
    sim.set_delay(0, 0)
    side, host, other = torch.Stream("sim"), torch.empty(7000).pin_memory(), torch.empty(7000).pin_memory()
    used, kept = torch.ones(7000, device="sim"), torch.ones(7000, device="sim")
    address = used.data_ptr()
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        host.copy_(used, non_blocking=True)
        other.copy_(kept, non_blocking=True)
    used.record_stream(side)
    del used
    time.sleep(0.3)
    taken = torch.zeros(7000, device="sim")
    assert taken.data_ptr() == address
    assert sim.races() == []
    kept.zero_()
    assert found(sim) == {("copy down", "aten::zero_")}


def test_memory_is_given_out_again_on_its_stream_alone(sim):
    first = torch.ones(5000, device="sim")
    address = first.data_ptr()
    del first
    with torch.Stream("sim"):
        assert torch.empty(5000, device="sim").data_ptr() != address
    assert torch.ones(5000, device="sim").data_ptr() == address
    assert sim.races() == []


def test_memory_of_another_stream_is_not_ready_for_this_one(sim):
    """Who had it before on its own stream may still use it, whether or not there was somebody in this run."""
    side = torch.Stream("sim")
    there = torch.empty(5000, device="sim")
    with side:
        there.copy_(torch.ones(5000).pin_memory(), non_blocking=True)
    assert found(sim) == {("allocation", "copy up")}


def test_bytes_in_use_are_counted(sim):
    before = sim.memory_allocated()
    kept = torch.empty(1000, dtype=torch.uint8, device="sim")
    for _ in range(3):
        torch.empty(100_000, dtype=torch.uint8, device="sim")
    assert sim.memory_allocated() == before + 1024
    # Two at once: the name of the loop holds none, and 100 000 bytes are 196 times 512.
    assert sim.max_memory_allocated() == before + 1024 + 196 * 512
    assert torch.accelerator.memory_allocated() == sim.memory_allocated()
    assert torch.accelerator.max_memory_allocated() == sim.max_memory_allocated()
    del kept
    torch.accelerator.reset_peak_memory_stats()
    assert sim.max_memory_allocated() == sim.memory_allocated() == before


def test_more_than_the_limit_is_refused(sim):
    limit = sim.memory_allocated() + (1 << 20)
    sim.set_memory_limit(limit)
    try:
        kept = torch.empty(1 << 20, dtype=torch.uint8, device="sim")
        assert sim.mem_get_info() == torch.accelerator.get_memory_info() == (0, limit)
        with pytest.raises(
            torch.OutOfMemoryError, match=rf"sim:0 is out of memory: 4 bytes wanted, \d+ of {limit} in use"
        ):
            torch.empty(1, device="sim")
        assert kept.numel() == 1 << 20
    finally:
        sim.set_memory_limit(1 << 40)


def test_bytes_that_are_copied_are_counted(sim):
    there = torch.empty(1000, device="sim")
    sim.reset_bytes()
    there.copy_(torch.ones(1000))
    there.copy_(torch.ones(1000).pin_memory(), non_blocking=True)
    there[::2].copy_(torch.ones(500, dtype=torch.float64))
    there.to(torch.bfloat16).cpu()
    assert (sim.usage().up, sim.usage().down) == (4000 + 4000 + 2000, 2000)
    there.copy_(there.clone(), non_blocking=True)
    assert (sim.usage().up, sim.usage().down) == (10000, 2000)


def test_pages_go_back_to_the_system(sim):
    torch.empty(1 << 24, dtype=torch.uint8, device="sim")
    before = sim.resident()
    assert before >= 1 << 24
    torch.accelerator.empty_cache()
    assert sim.resident() <= before - (1 << 24)
    assert (torch.empty(1 << 24, dtype=torch.uint8, device="sim") == 255).all().item()

"""Host memory that copies use while the host goes on: pinned and registered."""

from __future__ import annotations

import mmap
import time

import pytest
import torch

LATE = 100_000


def found(sim):
    return {(each.first, each.second) for each in sim.races()}


def anonymous(nbytes):
    memory = mmap.mmap(-1, nbytes)
    return torch.frombuffer(memory, dtype=torch.float32)


def test_pinned_memory_is_known(sim):
    assert torch.empty(3, pin_memory=True).is_pinned()
    assert torch.empty(3).pin_memory()[1:].is_pinned()
    assert not torch.empty(3).is_pinned()
    assert torch.ones(3, device="sim").to("cpu", non_blocking=True).is_pinned()
    with pytest.raises(RuntimeError, match="only tensors of the host can be pinned"):
        torch.empty(3, device="sim", pin_memory=True)


def test_registered_memory_is_as_pinned(sim):
    sim.set_delay(LATE, LATE)
    host = anonymous(8192)
    address = host.data_ptr()
    sim.register_host(address, 4096)
    assert host[:10].is_pinned()
    with pytest.raises(RuntimeError, match="registered already"):
        sim.register_host(address + 4092, 8)
    event = torch.Event("sim")
    # All of what is copied has to be registered.
    for values, waits in ((host[:1024], False), (host[1000:1100], True)):
        there = torch.empty(values.shape, device="sim")
        there.copy_(values, non_blocking=True)
        event.record()
        assert event.query() == waits
        event.synchronize()
    sim.unregister_host(address)
    assert not host[:10].is_pinned()
    assert sim.races() == []
    with pytest.raises(RuntimeError, match=f"no host memory is registered at {address}"):
        sim.unregister_host(address)


def test_more_memory_than_may_be_locked(sim):
    host = anonymous(8192)
    sim.set_register_limit(8191)
    try:
        sim.register_host(host.data_ptr(), 4096)
        refused = "4096 bytes of host memory cannot be registered: 4096 of 8191 are already"
        with pytest.raises(RuntimeError, match=refused):
            sim.register_host(host.data_ptr() + 4096, 4096)
        sim.unregister_host(host.data_ptr())
        sim.register_host(host.data_ptr() + 4096, 4096)
        sim.unregister_host(host.data_ptr() + 4096)
    finally:
        sim.set_register_limit(2**63)


def test_memory_that_is_unregistered_too_early(sim):
    sim.set_delay(LATE, LATE)
    host = anonymous(4096)
    sim.register_host(host.data_ptr(), 4096)
    there = torch.empty(1024, device="sim")
    begun = time.monotonic()
    there.copy_(host, non_blocking=True)
    event = torch.accelerator.current_stream().record_event()
    assert not event.query()
    sim.unregister_host(host.data_ptr())
    assert time.monotonic() - begun >= LATE / 1e6, "the memory is kept until the copy, which is so late, is over"
    assert found(sim) == {("copy up", "unregister_host")}


def test_pinned_memory_is_not_given_out_while_a_copy_uses_it(sim):
    """As torch's allocator for CUDA: whoever frees a pinned tensor need not wait."""
    sim.set_delay(LATE, LATE)
    host = torch.ones(1000).pin_memory()
    address = host.data_ptr()
    there = torch.empty(1000, device="sim")
    there.copy_(host, non_blocking=True)
    del host
    assert torch.zeros(1000).pin_memory().data_ptr() != address
    # The allocator sees that the copy is over; the host itself has not waited.
    time.sleep(3 * LATE / 1e6)
    with sim.watch_host():
        again = [torch.empty(1000, pin_memory=True).zero_() for _ in range(8)]
    assert address in [each.data_ptr() for each in again]
    assert sim.races() == []
    assert there.cpu().equal(torch.ones(1000))


def test_copies_of_other_host_memory_are_waited_for(sim):
    sim.set_delay(LATE, LATE)
    host = torch.ones(1000)
    there = torch.empty(1000, device="sim")
    with sim.watch_host():
        there.copy_(host, non_blocking=True)
        host.zero_()
        host.copy_(there, non_blocking=True)
        assert host.equal(torch.ones(1000))
    assert sim.races() == []


def test_operators_of_the_host_are_watched(sim):
    """Reads and writes apart, views by their bytes, and nothing outside of the context."""
    sim.set_delay(LATE, LATE)
    host = torch.ones(1000).pin_memory()
    there = torch.empty(500, device="sim")
    there.copy_(host[:500], non_blocking=True)
    with sim.watch_host():
        host.sum()
        host[500:].zero_()
        host.view(100, 10)[:, 0]
    host[0] = 1
    assert sim.races() == []
    with sim.watch_host():
        host[499] = 1
    assert found(sim) == {("copy up", "aten::fill_")}

"""The device layer beside torch on a GPU: one context, torch's streams, registered host memory, refusals."""

from __future__ import annotations

import gc
import multiprocessing
import struct
import subprocess
import sys

import pytest
import torch

import zeroxide.kernels
from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels import compile as compiling
from zeroxide.kernels.launch import CudaLauncher, Kernel

FILL = """
struct Args { float *out; long long count; float value; float pad; };
extern "C" __global__ void zx_fill(const Args args) {
    const long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < args.count) args.out[at] += args.value;
}
"""


@pytest.fixture(scope="module")
def fill(launcher, cache):
    """Adds `value` to `count` floats at `address`: `fill(address, count, value)` on torch's current stream."""
    compiler = compiling.compiler()
    kept = compiler.compile("fill.cu", FILL, [], architecture=launcher.context.architecture, cache=cache)
    kernel = launcher.context.load("fill.cu", kept, "zx_fill")

    def start(tensor, value, threads=256):
        args = struct.pack("=Qqff", tensor.data_ptr(), tensor.numel(), value, 0.0)
        blocks = -(-tensor.numel() // 256)
        kernel.launch(blocks, threads, 0, torch.cuda.current_stream().cuda_stream, args)

    start.kernel = kernel
    return start


def test_the_device_is_the_one_that_torch_sees(launcher, device):
    found = _core.probe_cuda()
    assert found.devices == torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(device)
    context = launcher.context
    assert (context.name, context.multiprocessors) == (properties.name, properties.multi_processor_count)
    assert context.architecture == properties.major * 10 + properties.minor
    free, total = context.memory()
    assert total == torch.cuda.mem_get_info(device)[1]
    assert 0 < free <= total


def test_memory_of_torch_is_ours_and_torch_goes_on_after_us(fill, device):
    """Catches: another context than torch's, or one that stays current."""
    tensor = torch.zeros(1000, device=device)
    fill(tensor, 2.0)
    assert float(tensor.sum()) == 2000.0
    assert torch.cuda.current_device() == device.index
    context = _core.CudaContext(device.index)
    del context
    gc.collect()
    assert float((tensor + 1).sum()) == 3000.0


def test_kernels_run_on_the_current_stream_in_order(fill, device):
    """Catches: a launch on another stream, which would come before what this one waits for."""
    tensor = torch.zeros(1 << 20, device=device)
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    # The first round loads torch's kernels, for which the driver may wait for the device.
    for _ in range(2):
        side.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            tensor.fill_(5.0)
            fill(tensor, 1.0)
            tensor.mul_(2.0)
        event = side.record_event()
    assert not event.query(), "the sleep goes on"
    side.synchronize()
    assert bool((tensor == 12.0).all())


def test_a_captured_launch_is_replayed(fill, device):
    tensor = torch.zeros(1000, device=device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        fill(tensor, 1.0)
    assert float(tensor.sum()) == 0.0
    for _ in range(3):
        graph.replay()
    assert float(tensor.sum()) == 3000.0


def test_registered_memory_is_pinned_for_torch_and_copies_run_beside_the_host(launcher, device):
    nbytes = 64 << 20
    memory = launcher.context.host_memory(nbytes)
    host = torch.frombuffer(memory, dtype=torch.float32)
    assert host.is_pinned()
    plain = torch.frombuffer(launcher.context.host_memory(nbytes, registered=False), dtype=torch.float32)
    assert not plain.is_pinned()
    host.copy_(torch.arange(host.numel(), dtype=torch.float32))
    there = torch.empty_like(host, device=device)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(50_000_000)
    there.copy_(host, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    assert not event.query(), "the host does not wait for the copy"
    event.synchronize()
    assert torch.equal(there.cpu(), host)
    there.add_(1.0)
    host.copy_(there, non_blocking=True)
    torch.cuda.synchronize(device)
    assert torch.equal(host, torch.arange(host.numel(), dtype=torch.float32) + 1.0)


def test_memory_can_be_registered_again_after_its_end(launcher, device):
    for turn in range(3):
        memory = launcher.context.host_memory(8 << 20)
        host = torch.frombuffer(memory, dtype=torch.int32)
        there = torch.full((host.numel(),), turn, dtype=torch.int32, device=device)
        host.copy_(there, non_blocking=True)
        torch.cuda.synchronize(device)
        assert bool((host == turn).all())
        del memory, host
        gc.collect()


def test_what_is_refused_leaves_the_device_as_it_was(fill, device):
    tensor = torch.zeros(1000, device=device)
    with pytest.raises(DeviceError, match="takes one argument of 24 bytes, got 16"):
        fill.kernel.launch(1, 32, 0, 0, bytes(16))
    with pytest.raises(DeviceError, match="of 4 blocks of 4096 threads"):
        fill(tensor, 1.0, threads=4096)
    with pytest.raises(DeviceError, match="bytes of shared memory"):
        fill.kernel.launch(1, 32, 1 << 22, 0, bytes(24))
    fill(tensor, 1.0)
    assert float(tensor.sum()) == 1000.0


def test_a_device_that_is_not_there(launcher):
    count = torch.cuda.device_count()
    with pytest.raises(DeviceError, match=f"no CUDA device {count}: the driver shows {count}"):
        CudaLauncher(torch.device("cuda", count))


def test_a_kernel_that_is_not_there(launcher):
    kernel = zeroxide.kernels.KERNELS[0]
    with pytest.raises(DeviceError, match="has no kernel zx_none"):
        launcher.load(Kernel(kernel.source, "zx_none", 32))


def test_code_for_another_device_is_refused(launcher, cache):
    compiler = compiling.compiler()
    other = next(each for each in (80, 120) if each // 10 != launcher.context.architecture // 10)
    kept = compiler.compile("fill.cu", FILL, [], architecture=other, cache=cache)
    with pytest.raises(DeviceError, match=r"cannot load fill\.cu: CUDA_ERROR_"):
        launcher.context.load("fill.cu", kept, "zx_fill")


def in_child(context, channel):
    try:
        context.memory()
    except DeviceError as error:
        channel.put(str(error))
    else:
        channel.put(None)


def test_a_child_that_is_forked_after_cuda_began(launcher):
    fork = multiprocessing.get_context("fork")
    channel = fork.Queue()
    child = fork.Process(target=in_child, args=(launcher.context, channel))
    child.start()
    line = channel.get(timeout=60)
    child.join(60)
    assert "start processes by spawn" in line


LOST = """
import struct, sys, torch
from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels import compile as compiling
context = _core.CudaContext(0)
compiler = compiling.compiler()
text = 'struct A { int *at; }; extern "C" __global__ void zx_bad(const A a) { *a.at = 1; }'
kept = compiler.compile("bad.cu", text, [], architecture=context.architecture, cache=sys.argv[1])
kernel = context.load("bad.cu", kept, "zx_bad")
kernel.launch(1, 1, 0, 0, struct.pack("=Q", 8))
try:
    torch.cuda.synchronize()
except Exception:
    pass
try:
    kernel.launch(1, 1, 0, 0, struct.pack("=Q", 8))
except DeviceError as error:
    print(error)
"""


def test_a_lost_device_is_told_in_one_line(cache):
    """In a process of its own, whose context an illegal address ends. Catches: an end that hangs or is not named."""
    ended = subprocess.run([sys.executable, "-c", LOST, str(cache)], capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("device 0 is lost to this process: "), ended.stdout + ended.stderr[-2000:]
    assert "start again from the last checkpoint" in ended.stdout

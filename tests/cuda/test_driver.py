"""CUDA's driver from Python: whether there is one, launches, registered host memory, and what goes wrong with them."""

from __future__ import annotations

import gc
import multiprocessing
import re
import resource

import pytest
import torch
from fake_driver import COMPILER, WHY_NOT, FakeDriver
from nvrtc import WHY_NOT as NO_NVRTC
from nvrtc import nvrtc

from zeroxide import _core, errors
from zeroxide.errors import DeviceError
from zeroxide.kernels.compile import nvrtc_libraries

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)
needs_nvrtc = pytest.mark.skipif(nvrtc() is None, reason=NO_NVRTC)
LOST = 719
SOURCE = """
struct Args { float *out; long long count; float value; };
extern "C" __global__ void zx_fill(const Args args) { args.out[threadIdx.x] = args.value; }
"""


@pytest.fixture
def driver(tmp_path):
    folder = tmp_path / "driver"
    folder.mkdir()
    return FakeDriver(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One small kernel."""
    cache = tmp_path_factory.mktemp("cache")
    return _core.Nvrtc(nvrtc_libraries()).compile("fill.cu", SOURCE, [], architecture=90, cache=cache)


def loaded(driver, made, entry="zx_fill"):
    return _core.CudaContext(0, driver.path).load("fill.cu", made, entry)


def fields(error: BaseException) -> dict[str, object]:
    """What an error carries beside its line."""
    return {name: value for name, value in vars(error).items() if value is not None}


def test_a_machine_without_a_driver_is_an_answer():
    """Catches: a probe that raises, or that ends the process, where the library is missing."""
    found = _core.probe_cuda("libcuda-none.so.1")
    assert (found.version, found.devices) == (None, 0)
    assert found.problem.startswith("no CUDA driver: libcuda-none.so.1 cannot be loaded (")
    assert "\n" not in found.problem
    with pytest.raises(DeviceError) as caught:
        _core.CudaContext(0, "libcuda-none.so.1")
    assert str(caught.value) == found.problem
    assert caught.value.library == "libcuda-none.so.1"


@needs_compiler
def test_what_a_driver_says_of_itself(driver, tmp_path):
    found = _core.probe_cuda(driver.path)
    assert (found.version, found.devices, found.problem) == ((13, 0), 2, None)
    context = _core.CudaContext(1, driver.path)
    assert (context.device, context.name, context.architecture) == (1, "Fake 1", 90)
    assert context.memory() == (1 << 30, 2 << 30)
    with pytest.raises(DeviceError, match="no CUDA device 2: the driver shows 2") as caught:
        _core.CudaContext(2, driver.path)
    assert fields(caught.value) == {"device": 2, "devices": 2}
    old = FakeDriver(tmp_path / "driver", "-DVERSION=11080")
    problem = _core.probe_cuda(old.path).problem
    assert (
        problem == f"the CUDA driver {old.path} is too old: it is for CUDA 11.8, needed is 12.0; update NVIDIA's driver"
    )


@needs_compiler
def test_the_context_is_torch_s_and_is_left_as_it_was(driver):
    """Catches: a context that stays current or retained after the last who needs it."""
    context = _core.CudaContext(0, driver.path)
    memory = context.host_memory(4096)
    assert driver.library.fake_retained(0) == 1
    assert driver.library.fake_depth() == 0
    del context
    assert driver.library.fake_retained(0) == 1
    del memory
    gc.collect()
    assert driver.library.fake_retained(0) == 0
    assert driver.log() == ["retain 0", "register 4096 1", "unregister", "release 0"]


@needs_compiler
@needs_nvrtc
def test_a_launch_passes_what_it_was_given(driver, made):
    """Catches: bytes, sizes or a stream in each other's place, and another context than the primary one."""
    kernel = loaded(driver, made)
    driver.log()
    args = bytes(range(24))
    kernel.launch(7, 96, 100, 0, args)
    kernel.launch(4096, 1024, 64 << 10, 0, args)
    assert driver.log() == [
        f"launch zx_fill 7 96 100 0 c0de00 {args.hex()}",
        f"set 8 {64 << 10}",
        f"launch zx_fill 4096 1024 {64 << 10} 0 c0de00 {args.hex()}",
    ]
    assert driver.library.fake_depth() == 0
    assert kernel.usage() == (32, 0, 24)
    del kernel
    gc.collect()
    assert driver.log() == ["unload", "release 0"]


@needs_compiler
@needs_nvrtc
def test_what_a_launch_refuses(driver, made):
    kernel = loaded(driver, made)
    driver.log()
    with pytest.raises(DeviceError, match="takes one argument of 24 bytes, got 16") as caught:
        kernel.launch(1, 32, 0, 0, bytes(16))
    assert fields(caught.value) == {"entry": "zx_fill", "expected": 24, "got": 16}
    with pytest.raises(DeviceError, match="stream 0x63 is not one of device 0: CUDA_ERROR_INVALID_HANDLE") as caught:
        kernel.launch(1, 32, 0, 99, bytes(24))
    assert (caught.value.what, caught.value.handle, caught.value.device) == ("stream", 99, 0)
    with pytest.raises(DeviceError, match="of 3 blocks of 2048 threads with 5 bytes of shared memory") as caught:
        kernel.launch(3, 2048, 5, 0, bytes(24))
    assert (caught.value.blocks, caught.value.threads, caught.value.shared_bytes) == (3, 2048, 5)
    with pytest.raises(DeviceError, match="with 300000 bytes of shared memory"):
        kernel.launch(3, 32, 300_000, 0, bytes(24))
    assert [line for line in driver.log() if line.startswith("launch")] == []
    driver.fail("cuLaunchKernel", LOST)
    with pytest.raises(
        DeviceError, match="device 0 is lost to this process: cuLaunchKernel says CUDA_ERROR_LAUNCH"
    ) as caught:
        kernel.launch(1, 32, 0, 0, bytes(24))
    assert (caught.value.call, caught.value.device) == ("cuLaunchKernel", 0)


@needs_compiler
@needs_nvrtc
def test_what_cannot_be_loaded(driver, made, tmp_path):
    with pytest.raises(DeviceError, match=r"^fill\.cu has no kernel zx_other$") as caught:
        loaded(driver, made, "zx_other")
    assert fields(caught.value) == {"source_name": "fill.cu", "entry": "zx_other"}
    driver.fail("cuModuleLoadData", 200)
    with pytest.raises(DeviceError, match=r"device 0 \(sm_90\) cannot load fill\.cu: CUDA_ERROR_INVALID_IMAGE"):
        loaded(driver, made)
    driver.fail("cuModuleLoadData", 2)
    with pytest.raises(DeviceError, match=r"out of device memory: .* for machine code do not fit") as caught:
        loaded(driver, made)
    assert (caught.value.free, caught.value.total) == (1 << 30, 2 << 30)
    older = FakeDriver(tmp_path / "driver", "-DVERSION=12080")
    with pytest.raises(DeviceError, match=r"is too old: it is for CUDA 12\.8, needed is 13\.0"):
        loaded(older, made)
    # A driver that cannot tell the size of arguments takes what it is given.
    plain = FakeDriver(tmp_path / "driver", "-DWITHOUT_PARAMETER_INFO")
    kernel = loaded(plain, made)
    kernel.launch(1, 32, 0, 0, bytes(8))
    assert kernel.usage()[2] is None


@needs_compiler
def test_host_memory_is_registered_exactly_and_is_a_buffer(driver):
    """Catches: more or fewer bytes than asked for, and a buffer that outlives its memory."""
    context = _core.CudaContext(0, driver.path)
    memory = context.host_memory(100_001)
    assert "register 100001 1" in driver.log()
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    assert (tensor.data_ptr(), tensor.numel()) == (memory.address, memory.nbytes) == (memory.address, 100_001)
    tensor.fill_(7)
    del memory
    gc.collect()
    assert driver.library.fake_registered() == 1
    assert int(tensor.sum()) == 700_007
    del tensor
    gc.collect()
    assert driver.library.fake_registered() == 0
    driver.log()
    plain = context.host_memory(4096, registered=False)
    assert (plain.nbytes, driver.log()) == (4096, [])


@needs_compiler
def test_memory_that_cannot_be_locked_is_refused_with_the_limit(driver):
    context = _core.CudaContext(0, driver.path)
    driver.library.fake_register_limit(1 << 20)
    with pytest.raises(DeviceError, match="device 0 cannot register 2097152 bytes of host memory") as caught:
        context.host_memory(2 << 20)
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert caught.value.limit == ("unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes")
    assert caught.value.limit in str(caught.value)
    assert (caught.value.bytes, caught.value.device) == (2 << 20, 0)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in caught.value.reason
    assert driver.library.fake_registered() == 0


def in_child(context, channel):
    try:
        context.memory()
    except DeviceError as error:
        channel.put((str(error), error.created, error.current))
    else:
        channel.put(None)


@needs_compiler
def test_a_forked_child_is_refused(driver):
    context = _core.CudaContext(0, driver.path)
    fork = multiprocessing.get_context("fork")
    channel = fork.Queue()
    child = fork.Process(target=in_child, args=(context, channel))
    child.start()
    line, created, current = channel.get(timeout=60)
    child.join(60)
    assert "start processes by spawn" in line
    assert (created, current) == (multiprocessing.current_process().pid, child.pid)


def test_every_value_of_the_device_layer_has_a_place_in_python():
    """Catches: a value that the core passes on under a name that no class of `zeroxide.errors` tells of."""
    source = (errors.__file__.rpartition("/python/")[0] or ".") + "/crates/zeroxide-offload/src/facts.rs"
    try:
        with open(source) as handle:
            text = handle.read()
    except FileNotFoundError:
        pytest.skip("the core's source is not here")
    for kind, target in (("Cuda", DeviceError), ("Device", errors.CoreError)):
        (listed,) = re.findall(rf"facts_of!\(self, {kind}Error:(.*?)\)\n", text, re.DOTALL)
        for variant, listed_fields in re.findall(r"(\w+) \{([^}]*)\}", listed):
            names = {field for field, note in re.findall(r"(\w+): (\w+)", listed_fields) if note != "system"}
            assert names <= target.__annotations__.keys(), (kind, variant)

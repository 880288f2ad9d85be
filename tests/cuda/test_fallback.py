"""Where kernels cannot run, wrappers compute by torch: what kernels give, and one line that says so."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace

import nvrtc
import pytest
import torch
from emulated import RANDOM, Emulator, Guards, close, same_bits, special
from fake_driver import COMPILER, WHY_NOT, FakeDriver

import zeroxide.kernels
from zeroxide.errors import DeviceError, TensorError
from zeroxide.kernels import compile as compiling
from zeroxide.kernels import fallback, launchers, shipped, update
from zeroxide.kernels.accumulate import accumulate
from zeroxide.kernels.cross_entropy import FP32_TOLERANCE, RowSums, add_chunk, gradient_to, launcher_for
from zeroxide.kernels.launch import CudaLauncher
from zeroxide.kernels.norm import PIECE, scaled_norm, sums_of_squares
from zeroxide.kernels.permute import combine_rows, gather_rows
from zeroxide.kernels.quantise import dequantise, quantise

HOST = torch.device("cpu")
CASES = {case.name: case for case in zeroxide.kernels.ALL}
needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc() is None, reason=nvrtc.WHY_NOT)
needs_driver = pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    """Each reason is told once in a process."""
    fallback._warn.cache_clear()
    yield
    fallback._warn.cache_clear()


@pytest.fixture
def by_torch():
    """A launcher of a device that has no kernels."""
    with pytest.warns(RuntimeWarning, match="there are no kernels for cpu"):
        return zeroxide.kernels.launcher(HOST)


@pytest.mark.parametrize("name", sorted(CASES))
def test_torch_gives_what_the_kernel_gives(name, libraries, by_torch):
    """In place where that is asked for, and nothing else is written. Catches: a wrapper that does without its kernel
    and gives nothing, and other bits, the shape or the dtype of a reference that is not the wrapper's."""
    case = CASES[name]
    runs = [(n, None) for n in (0, 1, 33, 1023, 5003)]
    runs += [(2000, functools.partial(special, finite=finite)) for finite in (True, False)]
    for n, change in runs:
        guards, given = Guards(), []
        for shift in (0, 1):
            inputs = case.make(n, HOST)
            if change is not None:
                change(inputs)
            given.append({key: [guards.copy(each, shift) for each in every] for key, every in inputs.items()})
        expected = case.run(Emulator(libraries, RANDOM, seed=n), given[0])
        got = case.run(by_torch, given[1])
        # Each of the two is within the tolerance of what is true.
        assert [close(*each, 2 * case.tolerance) for each in zip(got, expected, strict=True)] == [True] * len(got), n
        assert guards.intact()


def test_sums_of_squares_by_torch(libraries, by_torch):
    """The engine's norm, which no case runs, over several pieces. Catches: another order of sums."""
    for dtype, sizes in ((torch.float32, (1, PIECE, 3 * PIECE + 5, 17 * PIECE + 4097)), (torch.bfloat16, (1, 4097))):
        drawn = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1))
        tensors = (drawn * drawn.square()).to(dtype).split(list(sizes))
        expected = sums_of_squares(Emulator(libraries), tensors)
        got = sums_of_squares(by_torch, tensors)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)
    with pytest.raises(TensorError, match="has no element"):
        sums_of_squares(by_torch, [torch.empty(0)])


def test_updates_by_the_core_go_on_in_parts(by_torch, libraries, monkeypatch):
    """Catches: parts that are left out, updated twice or from another place of the gradient."""
    monkeypatch.setattr(update, "AT_ONCE", 1000)
    case = CASES["update_adamw_split_bf16"]
    expected = case.run(Emulator(libraries), case.make(2345, HOST))
    got = case.run(by_torch, case.make(2345, HOST))
    assert all(torch.equal(*each) for each in zip(got, expected, strict=True))


def test_what_is_known_of_rows_after_some_chunks(libraries, by_torch):
    """In any order of chunks, some rows not finite. Catches: a target of another chunk, a NaN in the maximum."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 7], logits[2, :], logits[3, 30], logits[4, 33] = torch.nan, -torch.inf, torch.inf, -torch.inf
    targets = torch.tensor([16, 15, 31, 32, 40, -100])
    known = []
    for launcher in (Emulator(libraries), by_torch):
        sums = RowSums.empty(6, HOST)
        for first, end in ((32, 40), (0, 16), (16, 32)):
            add_chunk(launcher, sums, logits[:, first:end].contiguous(), first, targets)
            known.append((sums.largest.clone(), sums.sum.clone(), sums.target_logit.clone()))
    for mine, theirs in zip(known[:3], known[3:], strict=True):
        assert same_bits(theirs[0], mine[0])
        assert close(theirs[1], mine[1], 2 * FP32_TOLERANCE)
        assert same_bits(theirs[2], mine[2])


def test_shapes_are_the_wrappers_own(libraries, by_torch):
    """Tensors of as many elements and other shapes, as kernels take them."""
    runs = []
    for launcher in (Emulator(libraries), by_torch):
        home, gradient = torch.ones(6, 4), torch.arange(24.0).view(2, 12)
        accumulate(launcher, home, gradient, add=True)
        codes = quantise(launcher, gradient.view(2, 3, 4), 4, seed=3)
        rows = gather_rows(launcher, home, torch.tensor([[1, -1], [5, 0]]), torch.full((2, 2), 2.0))
        sums, logits, targets = RowSums.empty(6, HOST), home.clone(), torch.tensor([[0, 1, 2], [3, -100, 1]])
        add_chunk(launcher, sums, logits, 0, targets)
        turned = torch.empty(4, 6)
        gradient_to(launcher, turned, logits, 0, targets, sums, torch.ones(2, 3))
        empty = scaled_norm(launcher, [torch.empty(0, 3)])
        runs.append(
            [home, codes.codes, codes.scales, dequantise(launcher, codes, torch.bfloat16), rows, sums.sum, sums.largest,
             sums.target_logit, turned, combine_rows(launcher, rows, torch.tensor([[0, 1], [3, -1]]), torch.ones(4)),
             empty.norm, empty.nonfinite]
        )  # fmt: skip
    for mine, theirs in zip(*runs, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=0)


def test_what_a_wrapper_refuses_it_refuses(by_torch):
    with pytest.raises(TensorError, match="the gradient is strided"):
        accumulate(by_torch, torch.ones(4), torch.ones(8)[::2], add=True)
    with pytest.raises(ValueError, match="3 bits"):
        quantise(by_torch, torch.ones(4), 3)
    with pytest.raises(DeviceError, match="zx_norm_chunks_f32 cannot run on cpu: there are no kernels for cpu"):
        by_torch.launch(zeroxide.kernels.KERNELS[0], 1, b"")


def test_a_reason_is_told_once():
    """Catches: a line for each launcher or each kernel, and none for another reason."""

    def use():
        for device in (HOST, HOST, torch.device("meta")):
            launcher = zeroxide.kernels.launcher(device)
            for name in ("norm_f32", "accumulate_f32_f32"):
                CASES[name].run(launcher, CASES[name].make(9, HOST))

    with pytest.warns(RuntimeWarning) as told:
        use()
    assert [str(each.message) for each in told] == [
        f"torch computes on {device} what kernels would, in more time and memory: there are no kernels for {device}"
        for device in ("cpu", "meta")
    ]


# On a GPU, as far as a driver for tests has one -----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A function that makes the launcher of a GPU, given its compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "driver").mkdir()

    def make(capability):
        driver = FakeDriver(tmp_path / "driver", f"-DCAPABILITY={capability}")
        monkeypatch.setitem(launchers.LAUNCHERS, "cuda", functools.partial(CudaLauncher, library=driver.path))
        return zeroxide.kernels.launcher(torch.device("cuda", 1)), driver

    return make


@pytest.fixture
def without_shipped_code(monkeypatch, tmp_path):
    """As if the wheel had been built where no compiler was."""
    monkeypatch.setattr(shipped, "shipped", lambda *given: None)


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "nvrtc_libraries", lambda: ["libnvrtc-none.so.13"])
    compiling.compiler.cache_clear()
    yield
    compiling.compiler.cache_clear()


def results(launcher) -> list[torch.Tensor]:
    found = []
    for name in ("norm_f32", "pack_f32_bf16", "update_lion_split_bf16"):
        found += CASES[name].run(launcher, CASES[name].make(700, HOST))
    return found


def check_by_torch(launcher, libraries):
    expected = results(Emulator(libraries))
    assert all(close(*each, 0.0) for each in zip(results(launcher), expected, strict=True))


@needs_nvrtc
@needs_driver
def test_kernels_run_where_they_can(gpu):
    """Catches: torch that computes though the device has kernels, and a line for nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher, driver = gpu(90)
        driver.log()
        driver.library.fake_argument_bytes(32)
        home = torch.zeros(3)
        accumulate(launcher, home, torch.ones(3), add=False)
    assert [line.split()[:1] for line in driver.log()] == [["load"], ["launch"]]
    # That driver computes nothing.
    assert not home.any()


@needs_nvrtc
@needs_driver
def test_a_device_that_the_compiler_does_not_know(gpu, libraries):
    """Newer or older than anything here. Catches: an error in the middle of a program instead of a line."""
    for capability in (37, 199):
        with pytest.warns(RuntimeWarning) as told:
            check_by_torch(gpu(capability)[0], libraries)
        (line,) = {str(each.message) for each in told}
        assert len(told) == 1
        assert line.startswith("torch computes on cuda:1 what kernels would, in more time and memory: NVRTC ")
        assert f"cannot compile for sm_{capability}: it knows sm_" in line


@needs_driver
def test_no_compiler_and_nothing_shipped(gpu, without_shipped_code, without_compiler, libraries):
    with pytest.warns(RuntimeWarning, match=r"NVRTC cannot be loaded from libnvrtc-none\.so\.13 .*pip install") as told:
        check_by_torch(gpu(90)[0], libraries)
    assert len(told) == 1


def test_no_driver(monkeypatch, libraries):
    library = functools.partial(CudaLauncher, library="libcuda-none.so.1")
    monkeypatch.setitem(launchers.LAUNCHERS, "cuda", library)
    with pytest.warns(RuntimeWarning, match=r"no CUDA driver: libcuda-none\.so\.1 cannot be loaded") as told:
        check_by_torch(zeroxide.kernels.launcher(torch.device("cuda", 0)), libraries)
    assert len(told) == 1


@needs_nvrtc
@needs_driver
def test_one_source_that_cannot_be_made(gpu, monkeypatch, libraries):
    """Others have their kernels. Catches: a source without code that ends the program, and one that stops the rest."""
    real = shipped.compile_source

    def refuse(source, architecture):
        if source == "cast":
            raise DeviceError("NVRTC refuses cast.cu for sm_90: nothing here")
        return real(source, architecture)

    monkeypatch.setattr(shipped, "shipped", lambda *given: None)
    monkeypatch.setattr(shipped, "compile_source", refuse)
    launcher, _ = gpu(90)
    case = CASES["pack_f32_bf16"]
    with pytest.warns(RuntimeWarning, match=r"refuses cast\.cu for sm_90"):
        (packed,) = case.run(launcher, case.make(64, HOST))
    assert packed.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run(launcher, case.make(64, HOST))
    assert launcher.runs(next(each for each in zeroxide.kernels.KERNELS if each.source == "norm"))


def test_who_has_a_way_of_his_own_gets_kernels_only_where_they_run(monkeypatch):
    """Catches: kernels launched on what has no memory of theirs, or while operators are traced; a launcher that
    computes by torch; a device asked again each time."""
    asked = []

    class Loaded:
        def load(self, kernel):
            if "f16" in kernel.entry and "bf16" not in kernel.entry:
                raise DeviceError("no such kernel here")

    def make(device):
        asked.append(device)
        return Loaded()

    launchers.launcher_of.cache_clear()
    values, sums = torch.ones(4, 4), torch.nn.Parameter(torch.ones(2, 2))
    assert launcher_for(values) is None
    monkeypatch.setitem(launchers.LAUNCHERS, "cpu", make)
    try:
        assert launcher_for(values) is launcher_for(sums) is not None
        assert launcher_for(values.double()) is None
        assert launcher_for(values.to("meta")) is None
        assert launcher_for(values.as_subclass(type("Own", (torch.Tensor,), {}))) is None
        with pytest.warns(RuntimeWarning, match="no such kernel here"):
            assert launcher_for(values.half()) is None
        assert asked == [HOST]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert launcher_for(values) is None
    finally:
        launchers.launcher_of.cache_clear()


def test_values_by_torch_go_where_they_are_to_be(by_torch):
    """Catches: values in memory of their own."""
    made, room = quantise(by_torch, torch.linspace(-3, 3, 300), 8), torch.zeros(300)
    assert dequantise(by_torch, made, torch.float32, out=room) is room
    assert torch.equal(room, dequantise(by_torch, made, torch.float32))
    assert room.any()

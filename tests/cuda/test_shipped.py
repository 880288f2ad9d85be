"""Machine code that comes with zeroxide: that it is there, that it is what the sources give, and when it is taken."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace

import nvrtc
import pytest
from emulated import ROOT

import zeroxide.kernels
from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels import shipped as shipping
from zeroxide.kernels.shipped import ARCHITECTURES, FOLDER, file_name, machine_code, runs_on, shipped

SOURCES = sorted({kernel.source for kernel in zeroxide.kernels.KERNELS})
needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc() is None, reason=nvrtc.WHY_NOT)


def why_none() -> str | None:
    """Why this zeroxide has no machine code with it, where it has none and need not have."""
    if FOLDER.is_dir() and any(FOLDER.iterdir()):
        return None
    if FOLDER.is_relative_to(ROOT / "python"):
        return "this is the working tree, for which no wheel was built: make does it"
    return nvrtc.WHY_NOT if nvrtc.nvrtc() is None else None


WHY_NONE = why_none()
needs_files = pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE))


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("cubins", ROOT / "cuda" / "cubins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_files
def test_a_wheel_has_code_of_every_source():
    """Catches: files that are not packed, and such as were made of other sources or by other options."""
    known = [each for each in ARCHITECTURES if nvrtc.nvrtc() is None or each in nvrtc.nvrtc().architectures]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {(source, each): shipped(source, each) for source in SOURCES for each in known}
    assert [each for each, kept in found.items() if kept is None] == []
    entries = {(kernel.source, kernel.entry) for kernel in zeroxide.kernels.KERNELS}
    missing = [
        (entry, each)
        for source, entry in entries
        for each in known
        if f".text.{entry}".encode() not in found[source, each].cubin
    ]
    assert missing == []
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(file_name(*each) for each in found)


@needs_nvrtc
def test_sources_in_the_extension_module_are_those_of_the_tree():
    """What machine code is compared with. Catches: a module that was built before a kernel was changed."""
    assert [(source, _core.kernel_source(source)) for source in SOURCES] == [
        (source, nvrtc.text_of(source)) for source in SOURCES
    ]
    assert _core.kernel_headers() == nvrtc.tree_headers()


@needs_files
@needs_nvrtc
def test_the_code_is_what_the_compiler_makes(tmp_path):
    """Bit by bit. Catches: code of something else under the right name, and a build that differs each time."""
    kept = shipped("permute", 80)
    if kept.compiler != nvrtc.nvrtc().version:
        pytest.skip("another version of NVRTC has made the code")
    given = ("permute.cu", nvrtc.text_of("permute"), nvrtc.tree_headers())
    fresh = nvrtc.nvrtc().compile(*given, architecture=80, cache=tmp_path)
    assert (fresh.cached, fresh.file()) == (False, kept.file())


def test_what_runs_on_a_device(monkeypatch):
    """The rule of binary compatibility. Catches: code of another generation, or of a later minor version."""
    assert {each: runs_on(each) for each in (70, 75, 80, 86, 89, 90, 100, 103, 110, 120, 121)} == {
        70: [], 75: [], 80: [80], 86: [80], 89: [80], 90: [90], 100: [100], 103: [100], 110: [], 120: [120], 121: [120],
    }  # fmt: skip
    assert [runs_on(each) for each in (87, 101)] == [[], []]
    monkeypatch.setattr(shipping, "ARCHITECTURES", (80, 86, 89))
    assert {each: runs_on(each) for each in (80, 86, 89)} == {80: [80], 86: [86, 80], 89: [89, 86, 80]}


@pytest.fixture
def folder(builder, tmp_path, monkeypatch):
    """Machine code of one source for two architectures."""
    kernels = [kernel for kernel in zeroxide.kernels.KERNELS if kernel.source == "permute"]
    monkeypatch.setattr(builder, "KERNELS", kernels)
    monkeypatch.setattr(builder, "ARCHITECTURES", (80, 90))
    builder.fill(tmp_path)
    return tmp_path


@needs_nvrtc
def test_a_folder_is_filled_and_filled_again(folder, builder, monkeypatch, capsys):
    """Catches: what is made again though it is there, damage that stays, files of sources that are no more."""
    names = ["permute.sm_80.cubin", "permute.sm_90.cubin"]
    files = {name: (folder / name).read_bytes() for name in names}
    made, real = [], builder.compiler()

    def compile(name, text, headers, *, architecture, cache):
        made.append((name, architecture))
        return real.compile(name, text, headers, architecture=architecture, cache=cache)

    counted = SimpleNamespace(version=real.version, architectures=real.architectures, compile=compile)
    monkeypatch.setattr(builder, "compiler", lambda: counted)
    damaged = folder / names[0]
    damaged.write_bytes(files[names[0]][:-1])
    (folder / "gone.sm_80.cubin").touch()
    capsys.readouterr()
    builder.fill(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert made == [("permute.cu", 80)]
    assert capsys.readouterr().out.startswith("kernels for sm_80, sm_90 by NVRTC ")


def test_a_build_without_a_compiler_says_so(builder, tmp_path, monkeypatch, capsys):
    """Catches: code of an earlier build that a wheel goes on with, and a build that ends."""

    def none():
        raise DeviceError("NVRTC cannot be loaded")

    monkeypatch.setattr(builder, "compiler", none)
    (tmp_path / "permute.sm_80.cubin").touch()
    builder.main(tmp_path)
    assert capsys.readouterr().out == "the wheel has no machine code of kernels: NVRTC cannot be loaded\n"
    assert [*tmp_path.iterdir()] == []


def compiled_at_run_time(monkeypatch) -> list[tuple[str, int]]:
    asked = []
    monkeypatch.setattr(shipping, "compile_source", lambda *given: asked.append(given))
    return asked


@needs_nvrtc
def test_when_shipped_code_is_taken(folder, monkeypatch):
    """Catches: a compiler that is asked though the code is there, code of other sources, code that the driver cannot
    take, and damage that goes unnoticed or ends the program."""
    asked = compiled_at_run_time(monkeypatch)
    kept = shipped("permute", 80, folder)
    driver = (kept.compiler[0], 0)
    assert machine_code("permute", 86, driver, folder).cubin == kept.cubin
    assert machine_code("permute", 90, driver, folder).cubin != kept.cubin
    assert asked == []
    assert machine_code("permute", 120, driver, folder) is None
    assert machine_code("norm", 80, driver, folder) is None
    assert machine_code("permute", 80, (driver[0] - 1, 9), folder) is None
    assert asked == [("permute", 120), ("norm", 80), ("permute", 80)]
    path: Path = folder / file_name("permute", 80)
    (folder / file_name("norm", 80)).write_bytes(path.read_bytes())
    assert shipped("norm", 80, folder) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:-300] + bytes([whole[-300] ^ 1]) + whole[-299:])
    with pytest.warns(RuntimeWarning, match=r"permute\.sm_80\.cubin is damaged: .*; install zeroxide again"):
        machine_code("permute", 80, driver, folder)
    assert asked[-1] == ("permute", 80)

"""Kernels compiled by the product's own compiler, and what the cache on disk keeps of them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_driver import COMPILER, WHY_NOT, FakeDriver
from nvrtc import WHY_NOT as NO_NVRTC
from nvrtc import nvrtc

import zeroxide.kernels
from zeroxide import _core
from zeroxide.errors import DeviceError
from zeroxide.kernels import compile as compiling
from zeroxide.kernels import launch as launching
from zeroxide.kernels.compile import compile_source
from zeroxide.kernels.launch import CudaLauncher, Kernel

needs_nvrtc = pytest.mark.skipif(nvrtc() is None, reason=NO_NVRTC)
TEXT = '#include "zx/value.cuh"\nextern "C" __global__ void zx_a(float *out) { out[threadIdx.x] = VALUE; }\n'
HEADERS = [("zx/value.cuh", "#define VALUE 1.0f\n")]


def compile_at(cache, *, text=TEXT, headers=HEADERS, architecture=90, options=None):
    compiler = _core.Nvrtc(compiling.nvrtc_libraries())
    return compiler.compile("a.cu", text, headers, architecture=architecture, cache=cache, options=options)


@needs_nvrtc
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_every_source_of_the_wheel_compiles(architecture, tmp_path, monkeypatch):
    """Catches: a source or a header that the extension module does not carry, and options that NVRTC does not know."""
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path))
    sources = sorted({kernel.source for kernel in zeroxide.kernels.KERNELS})
    assert sources
    for source in sources[:2]:
        made = compiling.compile_source(source, architecture)
        assert (made.cubin[:4], made.cached, made.problem) == (b"\x7fELF", False, None)
        assert all(
            f".text.{each.entry}".encode() in made.cubin for each in zeroxide.kernels.KERNELS if each.source == source
        )


@needs_nvrtc
def test_what_was_compiled_is_not_compiled_again(tmp_path):
    """Catches: a cache that is never hit, or hit by another source, header, architecture or option."""
    first = compile_at(tmp_path / "new" / "folder")
    assert (first.cached, first.problem) == (False, None)
    (file,) = (tmp_path / "new" / "folder").iterdir()
    again = compile_at(tmp_path / "new" / "folder")
    assert (again.cached, again.cubin) == (True, first.cubin)
    assert [*(tmp_path / "new" / "folder").iterdir()] == [file]
    for change in (
        {"text": TEXT + "\n"},
        {"headers": [("zx/value.cuh", "#define VALUE 2.0f\n")]},
        {"architecture": 80},
        {"options": ["--fmad=true"]},
    ):
        other = compile_at(tmp_path / "new" / "folder", **change)
        assert not other.cached
        assert compile_at(tmp_path / "new" / "folder", **change).cubin == other.cubin


@needs_nvrtc
def test_a_damaged_file_is_compiled_anew(tmp_path):
    first = compile_at(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", whole[:-100] + b"\0" * 100, whole[:200] + b"X" + whole[201:]):
        file.write_bytes(damaged)
        made = compile_at(tmp_path)
        assert (made.cached, made.problem, made.cubin) == (False, None, first.cubin)
        assert file.read_bytes() == whole


@needs_nvrtc
def test_errors_of_a_source_come_with_the_compiler_s_log(tmp_path):
    with pytest.raises(DeviceError) as caught:
        compile_at(tmp_path, text="__device__ int x =\n\n    nothing;\n")
    line = str(caught.value)
    assert line.startswith("NVRTC ")
    assert ' refuses a.cu for sm_90: a.cu(3): error: identifier "nothing" is undefined' in line
    assert "\n" not in line
    assert (caught.value.source_name, caught.value.architecture) == ("a.cu", 90)
    assert caught.value.log.endswith('| 1 error detected in the compilation of "a.cu".')
    with pytest.raises(DeviceError, match="unrecognized option"):
        compile_at(tmp_path, options=["--no-such-option"])
    with pytest.raises(DeviceError, match=r"a\.cu has a zero byte at 4"):
        compile_at(tmp_path, text="int \0x;")
    assert [*tmp_path.iterdir()] == []


@needs_nvrtc
def test_an_architecture_that_the_compiler_does_not_know(tmp_path):
    with pytest.raises(DeviceError, match=r"cannot compile for sm_37: it knows sm_") as caught:
        compile_at(tmp_path, architecture=37)
    assert caught.value.architecture == 37
    assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(caught.value.known.split(", "))
    assert caught.value.nvrtc == ".".join(map(str, _core.Nvrtc(compiling.nvrtc_libraries()).version))


FAKE_NVRTC = r"""
#include <dlfcn.h>
#include <string.h>
static int compiled;
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 1; return 0; }
int nvrtcGetSupportedArchs(int *all) { *all = 90; return 0; }
int nvrtcCreateProgram(void **program) { *program = &compiled; return 0; }
int nvrtcDestroyProgram(void **program) { return 0; }
int nvrtcCompileProgram(void *program) { return dlopen("libnvrtc-builtins.so.13.0", RTLD_NOW) ? 0 : 7; }
int nvrtcGetProgramLogSize(void *program, long *bytes) { *bytes = 8; return 0; }
int nvrtcGetProgramLog(void *program, char *log) { strcpy(log, "a\nlog\n"); return 0; }
int nvrtcGetCUBINSize(void *program, long *bytes) { *bytes = 64; return 0; }
int nvrtcGetCUBIN(void *program, char *cubin) { memset(cubin, 0, 64); memcpy(cubin, "\177ELF\2\1", 6); return 0; }
const char *nvrtcGetErrorString(int code) { return code == 7 ? "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE" : "?"; }
"""


@pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)
def test_the_compiler_finds_the_library_beside_it(tmp_path):
    """NVRTC 13.0 asks the loader for its second library by name. Catches: a wheel's compiler that only compiles where
    torch happens to have loaded that library."""

    def build(name, text):
        (tmp_path / "source.c").write_text(text)
        command = [
            COMPILER,
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{name}",
            "-o",
            tmp_path / name,
            tmp_path / "source.c",
        ]
        subprocess.run([*command, "-ldl"], check=True)

    build("libnvrtc.so.13", FAKE_NVRTC)
    libraries = [str(tmp_path / "libnvrtc.so.13")]
    with pytest.raises(
        DeviceError, match=r"NVRTC 13\.0 failed in nvrtcCompileProgram for a\.cu: NVRTC_ERROR_\w+: a \| log"
    ):
        _core.Nvrtc(libraries).compile("a.cu", "", [], architecture=90, cache=tmp_path / "cache")
    build("libnvrtc-builtins.so.13.0", "int builtins;")
    made = _core.Nvrtc(libraries).compile("a.cu", "", [], architecture=90, cache=tmp_path / "cache")
    assert made.cubin[:4] == b"\x7fELF"


def test_a_machine_without_a_compiler():
    with pytest.raises(DeviceError) as caught:
        _core.Nvrtc(["/nowhere/libnvrtc.so.13", "libnvrtc-none.so.12"])
    assert caught.value.tried == "/nowhere/libnvrtc.so.13, libnvrtc-none.so.12"
    assert "libnvrtc-none.so.12" in caught.value.reason
    assert str(caught.value).endswith("it comes with torch's CUDA wheels: pip install nvidia-cuda-nvrtc")


@needs_nvrtc
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_takes_nothing(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    check_not_kept(tmp_path / "kernels")


@needs_nvrtc
def test_a_directory_that_cannot_be(tmp_path):
    """The code is there, and that it is not kept is said."""
    (tmp_path / "file").write_text("in the way")
    check_not_kept(tmp_path / "file")


def check_not_kept(folder):
    made = compile_at(folder)
    assert made.cubin[:4] == b"\x7fELF"
    assert made.problem.startswith(f"cannot create {folder} in the kernel cache: ")
    assert "set ZEROXIDE_CACHE_DIR" in made.problem


@needs_nvrtc
def test_that_it_is_not_kept_is_warned_of(tmp_path, monkeypatch):
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="in the kernel cache"):
        compiling.compile_source(zeroxide.kernels.KERNELS[0].source, 90)


RANK = """
import sys
from zeroxide import _core
compiler = _core.Nvrtc(sys.argv[3:])
for turn in range(20):
    text = 'extern "C" __global__ void zx_%d() {}' % (turn % 4)
    made = compiler.compile("a.cu", text, [], architecture=90, cache=sys.argv[1])
    assert made.problem is None and b".text.zx_%d" % (turn % 4) in made.cubin, made.problem
    open(sys.argv[2], "a").write("x") if turn == 0 else None
"""


@needs_nvrtc
def test_many_processes_use_one_directory(tmp_path):
    """Catches: a file that is seen before it is whole, or that two write at once."""
    command = [sys.executable, "-c", RANK, str(tmp_path / "cache"), str(tmp_path / "begun")]
    ranks = [subprocess.Popen([*command, *compiling.nvrtc_libraries()], stderr=subprocess.PIPE) for _ in range(3)]
    # Threads of one process as well, while the others run.
    texts = [f'extern "C" __global__ void zx_{turn}() {{}}' for turn in range(4)]
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(compile_at(tmp_path / "cache", text=each, headers=[]) for each in texts)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said.decode()
    assert [made.problem for made in found] == [None] * 8
    names = sorted(each.name for each in (tmp_path / "cache").iterdir())
    assert len(names) == 4
    assert all(name.endswith(".cubin") for name in names)


def test_where_the_cache_is(tmp_path):
    directory = compiling.cache_directory
    home = {"HOME": "/home/one"}
    assert str(directory(home)) == "/home/one/.cache/zeroxide/kernels"
    assert str(directory({**home, "XDG_CACHE_HOME": "/var/cache"})) == "/var/cache/zeroxide/kernels"
    assert str(directory({**home, "XDG_CACHE_HOME": "not/absolute"})) == "/home/one/.cache/zeroxide/kernels"
    assert str(directory({**home, "XDG_CACHE_HOME": "/x", "ZEROXIDE_CACHE_DIR": "/own"})) == "/own/kernels"


def test_without_a_home_directory_somebody_must_say(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(DeviceError, match="set ZEROXIDE_CACHE_DIR to a directory"):
        compiling.cache_directory({})


@pytest.mark.parametrize(
    ("cuda", "first"), [("12.8", "cuda_nvrtc/lib/libnvrtc.so.12"), ("13.0", "cu13/lib/libnvrtc.so.13")]
)
def test_the_compiler_of_torch_s_cuda_version_is_tried_first(cuda, first, tmp_path, monkeypatch):
    """Catches: a wheel layout that is not looked into, and a later compiler than the driver that torch needs."""
    names = ("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.0", "cuda_nvrtc/lib/libnvrtc.so.12")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(compiling, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = compiling.nvrtc_libraries()
    assert found[0] == str(tmp_path / first)
    assert sorted(found) == sorted([str(tmp_path / names[0]), str(tmp_path / names[2]), *compiling.LOADER_NAMES])
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert compiling.nvrtc_libraries() == [*compiling.LOADER_NAMES]


class Stream:
    cuda_stream = 0


@pytest.fixture
def as_if_there_was_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream)


@needs_nvrtc
@pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)
def test_the_launcher_compiles_once_and_launches_on_torch_s_stream(as_if_there_was_a_gpu, monkeypatch, tmp_path):
    """Catches: another device than torch's, another stream, a kernel that is loaded at each launch."""
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "driver").mkdir()
    driver = FakeDriver(tmp_path / "driver")
    launcher = CudaLauncher(library=driver.path)
    assert launcher.device == torch.device("cuda", 1)
    kernel = zeroxide.kernels.KERNELS[0]
    launcher.launch(kernel, 5, bytes(24))
    launcher.launch(kernel, 6, bytes(24))
    lines = [line.split() for line in driver.log()]
    assert [line[0] for line in lines] == ["retain", "load", "launch", "launch"]
    assert [line[1:7] for line in lines[2:]] == [
        [kernel.entry, blocks, str(kernel.threads), str(kernel.shared_bytes), "0", "c0de01"] for blocks in ("5", "6")
    ]
    elsewhere = CudaLauncher(torch.device("cuda", 0), library=driver.path)
    with pytest.raises(
        DeviceError, match=r"on device 0, and torch's current device is 1: launch under torch\.cuda\.device"
    ):
        elsewhere.launch(kernel, 5, bytes(24))
    monkeypatch.setattr(Stream, "cuda_stream", 99)
    with pytest.raises(DeviceError, match="stream 0x63 is not one of device 1"):
        launcher.launch(kernel, 5, bytes(24))
    with pytest.raises(DeviceError, match="has no kernel zx_none"):
        launcher.launch(Kernel(kernel.source, "zx_none", 32), 1, b"")


@needs_nvrtc
@pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)
def test_kernels_of_one_source_are_compiled_together(as_if_there_was_a_gpu, monkeypatch, tmp_path):
    """Also where nothing can be kept. Catches: a source that is compiled for each of its entry points."""
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path))
    (tmp_path / "driver").mkdir()
    launcher = CudaLauncher(library=FakeDriver(tmp_path / "driver").path)
    # Nothing has come with zeroxide.
    monkeypatch.setattr(launching, "machine_code", lambda source, device, driver: compile_source(source, device))
    kernels = (each for each in zeroxide.kernels.KERNELS if each.source == "norm")
    with pytest.warns(RuntimeWarning, match="in the kernel cache"):
        launcher.load(next(kernels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher.load(next(kernels))


def test_a_launcher_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(DeviceError, match=r"^no CUDA driver: libcuda-none\.so\.1 cannot be loaded"):
        CudaLauncher(library="libcuda-none.so.1")

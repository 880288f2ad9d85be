"""`aio.use_gds`: each reason why weights are not read straight to a device is told, by a stand-in for cuFile."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from fake_driver import COMPILER, WHY_NOT, FakeDriver

import zeroxide
from zeroxide import _core
from zeroxide.config import load
from zeroxide.device import direct_storage
from zeroxide.device.direct_storage import check_direct_storage, cufile_libraries, storage_problem
from zeroxide.errors import ConfigError, DeviceError

SOURCE = Path(__file__).parents[2] / "crates" / "zeroxide-device" / "tests" / "fake_cufile.c"
GPU = torch.device("cuda", 0)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=WHY_NOT)

REFUSALS = {
    "-DOPEN=5001": "cuFileDriverOpen says 5001 (CU_FILE_DRIVER_NOT_INITIALIZED, nvidia-fs is not loaded and the kernel "
    "has no other way)",
    "-DOPEN=5004": "cuFileDriverOpen says 5004 (CU_FILE_DRIVER_VERSION_MISMATCH, nvidia-fs is of another version)",
    "-DOPEN=5011": "cuFileDriverOpen says 5011 (CU_FILE_CUDA_DRIVER_ERROR, and CUDA's driver 999)",
    "-DOPEN=5999": "cuFileDriverOpen says 5999 (a code of no name here)",
    "-DREGISTER=5008": "cuFileHandleRegister says 5008 (CU_FILE_IO_NOT_SUPPORTED, the file system is not one that it "
    "knows)",
    "-DREGISTER=5027": "cuFileHandleRegister says 5027 (CU_FILE_HANDLE_NOT_REGISTERED, it knows nothing of the disk or "
    "its file system)",
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A function that builds cuFile for tests, and the driver that it needs. The current directory is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("CUFILE_LOGFILE_PATH", raising=False)
    (tmp_path / "driver").mkdir()
    driver = FakeDriver(tmp_path / "driver").path

    def make(*options):
        path = tmp_path / f"libcufile{''.join(options)}.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, SOURCE, *options], check=True)
        return {"driver": driver, "libraries": [str(path)]}

    return make


@pytest.fixture
def disk(tmp_path):
    """A directory that takes direct I/O, empty before and after."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        os.close(os.open(folder / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct I/O where tests have their files: {error}")
    (folder / "file").unlink()
    yield folder
    assert [*folder.iterdir()] == []


def probe(given, folder):
    _core.probe_storage(given["libraries"], folder, driver=given["driver"])


@needs_compiler
def test_where_everything_is_there(build, disk):
    """In the order that the library asks for: reads may not go through host memory, then begun, a file, all ended.
    Catches: the mode in which nothing that is missing is a problem, a handle or the library that stays, a log."""
    given = build()
    probe(given, disk)
    fake = ctypes.CDLL(given["libraries"][0])
    assert (fake.fake_opened(), fake.fake_handles()) == (0, 0)
    Path("cufile.log").unlink()
    assert storage_problem(disk, **given) is None
    assert [*Path.cwd().iterdir()] == []
    # The library is begun where it is a directory that has to be made yet.
    assert storage_problem(disk / "not" / "there", **given) is None


@needs_compiler
@pytest.mark.parametrize("option", sorted(REFUSALS))
def test_what_the_library_refuses_is_told_by_its_name(build, disk, option):
    """Catches: a refusal that counts as none, another code, the driver's code left out, a file that stays."""
    given = build(option)
    with pytest.raises(DeviceError) as caught:
        probe(given, disk)
    assert str(caught.value) == REFUSALS[option]
    assert caught.value.code == int(option.rsplit("=", 1)[1])
    assert storage_problem(disk, **given) == REFUSALS[option]
    fake = ctypes.CDLL(given["libraries"][0])
    assert (fake.fake_opened(), fake.fake_handles()) == (0, 0)


@needs_compiler
def test_what_is_missing_before_that(build, disk):
    given = build("-DOLD")
    missing = {**given, "libraries": ["/none/libcufile.so.0", "libcufile-none.so.0"]}
    assert storage_problem(disk, **missing).startswith(
        "cuFile cannot be loaded from /none/libcufile.so.0, libcufile-none.so.0 (libcufile-none.so.0: cannot open "
    )
    assert storage_problem(disk, **missing).endswith("pip install nvidia-cufile")
    assert "has no function cuFileSetParameterBool: it is too old" in storage_problem(disk, **given)
    without = storage_problem(disk, driver="libcuda-none.so.1", libraries=given["libraries"])
    assert without.startswith("no CUDA driver: libcuda-none.so.1 cannot be loaded")


@needs_compiler
def test_a_directory_without_direct_files(build):
    """Catches: an error of the system that is passed on without the place."""
    given = build()
    with pytest.raises(DeviceError, match=r"^no file in /proc can be opened for direct I/O: "):
        probe(given, "/proc")


@needs_compiler
def test_a_library_that_does_not_come_back(build, disk, monkeypatch):
    """It is asked in a process of its own. Catches: an engine that waits for ever, and one that ends with it."""
    monkeypatch.setattr(direct_storage, "SECONDS", 2.0)
    began = time.monotonic()
    assert storage_problem(disk, **build("-DHANGS")) == "cuFile does not answer within 2 s"
    assert time.monotonic() - began < 20
    ended = "cuFile ended the process that asked it, with -6: cuFile: something is very wrong"
    assert storage_problem(disk, **build("-DABORTS")) == ended


def test_where_the_library_is_looked_for(tmp_path, monkeypatch):
    """Catches: a wheel layout that is not looked into."""
    for name in ("cu13/lib/libcufile.so.0", "cufile/lib/libcufile.so.0", "cu13/lib/libcufile_rdma.so.1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(direct_storage, "find_spec", lambda name: spec if name == "nvidia" else None)
    expected = [str(tmp_path / name) for name in ("cu13/lib/libcufile.so.0", "cufile/lib/libcufile.so.0")]
    assert cufile_libraries() == [*expected, "libcufile.so.0"]
    monkeypatch.setattr(direct_storage, "find_spec", lambda name: None)
    assert cufile_libraries() == ["libcufile.so.0"]


def config(folder, **parts):
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(folder)}}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "aio": {"use_gds": True}, **parts}


def refused(given, device):
    with pytest.raises(ConfigError) as caught:
        check_direct_storage(load(given), device)
    assert caught.value.path == "aio.use_gds"
    line = str(caught.value)
    assert line.startswith("aio.use_gds: ")
    assert line.endswith("; remove it: reads go through host memory")
    return line.removeprefix("aio.use_gds: ").removesuffix("; remove it: reads go through host memory")


def test_why_a_config_is_refused(tmp_path, monkeypatch):
    """The nearest reason first, and never silently. Catches: a key without effect."""
    asked = []
    found = ["no CUDA driver", None]
    monkeypatch.setattr(direct_storage, "storage_problem", lambda folder: asked.append(folder) or found.pop(0))
    given = config(tmp_path)
    assert refused(given, torch.device("cpu")) == "the model computes in host memory"
    in_memory = config(tmp_path, zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}})
    assert refused(in_memory, GPU).startswith("no weights are on disk (zero_optimization.offload_param)")
    assert asked == []
    assert refused(given, GPU) == "no CUDA driver"
    assert refused(given, GPU).startswith("GPUDirect Storage is there, and zeroxide does not read through it yet: ")
    assert asked == [tmp_path, tmp_path]
    check_direct_storage(load(config(tmp_path, aio={"use_gds": False})), GPU)
    check_direct_storage(load(config(tmp_path, aio={})), GPU)


def test_an_engine_is_refused_with_the_reason(tmp_path):
    model = torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"^aio\.use_gds: the model computes in host memory; remove it"):
        zeroxide.initialize(model=model, config={**config(tmp_path), "optimizer": {"type": "AdamW"}})
    assert model(torch.ones(2, 3)).shape == (2, 3)

"""`zeroxide doctor`: each look says OK, or what is lost and how to get it."""

from __future__ import annotations

import json
import re
import resource
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked_cli import run_cli

from zeroxide import _core
from zeroxide.cli.doctor import look
from zeroxide.cli.machine import disks, gpus, processor, software
from zeroxide.errors import DeviceError, StorageError
from zeroxide.kernels import shipped

ROOT = Path(__file__).parents[2]


def by_what(findings):
    return {each.what: each for each in findings}


def told(ended):
    return {each["what"]: each for each in json.loads(ended.stdout)["findings"]}


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_good_directory_is_measured_and_left_as_it_was(tmp_path):
    ended = run_cli("doctor", tmp_path, "--json")
    found = told(ended)
    assert ended.returncode == 0, ended.stdout
    disk = found[f"disk {tmp_path}"]
    assert disk["state"] in ("ok", "lost")
    assert disk["data"]["write"] > 0
    assert disk["data"]["read"] > 0
    assert f"disk {tmp_path}: queue" in found
    assert f"disk {tmp_path}: O_DIRECT" in found
    assert list(tmp_path.iterdir()) == []
    assert found["instructions"]["data"]["instructions"] == _core.instruction_set()
    assert found["torch"]["state"] == "ok"
    assert found["memory"]["data"]["total"] > 1 << 30
    assert found["memory speed"]["data"]["rate"] > 1e8
    assert found["processors"]["data"]["usable"] >= 1


def test_every_line_is_ok_or_says_how(tmp_path):
    ended = run_cli("doctor", tmp_path)
    assert ended.returncode == 0, ended.stdout
    for line in ended.stdout.splitlines():
        assert re.fullmatch(r"OK     .+: .+|LOST   .+: .+ -> .+", line), line


def test_a_directory_that_was_asked_for_and_cannot_be_used_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    ended = run_cli("doctor", tmp_path / "none", tmp_path / "file", "--json")
    found = told(ended)
    assert ended.returncode == 1
    assert json.loads(ended.stdout)["ok"] is False
    assert (found[f"disk {tmp_path}/none"]["state"], found[f"disk {tmp_path}/none"]["found"]) == (
        "broken",
        "is not there",
    )
    assert found[f"disk {tmp_path}/file"]["found"] == "is a file"


@pytest.mark.parametrize(("name", "found"), [("x" * 300, "File name too long"), ("~nosuchuser/x", "no such user")])
def test_a_name_that_nothing_can_have_is_a_failure_in_one_line(name, found):
    """Catches: a traceback."""
    assert [(each.what, each.state, each.found) for each in disks.look(name)] == [(f"disk {name}", "broken", found)]


def test_a_directory_that_nobody_asked_for_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "none"))
    monkeypatch.setattr(processor, "look", lambda: iter(()))
    found = by_what(look([]))
    assert found[f"disk {tmp_path}/none"].state == "lost"
    assert by_what(look([str(tmp_path / "none")]))[f"disk {tmp_path}/none"].state == "broken"


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_without_io_uring_or_o_direct_loses_by_name(monkeypatch, tmp_path):
    speed = SimpleNamespace(engine="4 threads (io_uring was refused: EPERM)", direct=False, write=1e9, read=2e9)
    monkeypatch.setattr(_core, "measure_disk", lambda *rest: speed)
    what = f"disk {tmp_path}"
    found = by_what(disks.look(str(tmp_path)))
    assert found[what].found.endswith("writes 1.00 GB/s, reads 2.00 GB/s")
    assert found[f"{what}: queue"].state == "lost"
    assert "EPERM" in found[f"{what}: queue"].found
    assert "io_uring_disabled" in found[f"{what}: queue"].how
    assert found[f"{what}: O_DIRECT"].state == "lost"
    assert "ext4" in found[f"{what}: O_DIRECT"].how


def test_memory_that_looks_like_a_disk_is_told(monkeypatch):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in memory here")
    speed = SimpleNamespace(engine="io_uring, depth 16", direct=True, write=1e9, read=2e9)
    monkeypatch.setattr(_core, "measure_disk", lambda *rest: speed)
    found = by_what(disks.look("/dev/shm"))["disk /dev/shm"]
    assert (found.state, found.data["file_system"]) == ("lost", "tmpfs")


def test_a_disk_that_refuses_is_broken_in_one_line(monkeypatch, tmp_path):
    def refuse(*rest):
        raise StorageError("no space for x: 9 bytes needed, 1 bytes free")

    monkeypatch.setattr(_core, "measure_disk", refuse)
    (found,) = disks.look(str(tmp_path))
    assert found.state == "broken"
    assert "no space" in found.found


def test_the_core_measures_at_most_what_it_is_told(tmp_path):
    """Both passes stop after their time; what is left over of a block is not written."""
    found = _core.measure_disk(tmp_path, (8 << 20) + 5, 30.0)
    assert found.write > 0
    assert found.read > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="does not exist"):
        _core.measure_disk(tmp_path / "none", 8 << 20, 1.0)


# --- processor and memory --------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """proc and sys of a machine with two nodes, a container's limits, and 8 GiB."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for node in ("node0", "node1", "possible"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    return tmp_path


def test_limits_of_a_container_are_seen(machine):
    (machine / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    (machine / "sys/fs/cgroup/memory.max").write_text(f"{2 << 30}\n")
    found = by_what(processor.look(machine))
    assert found["processors"].state == "lost"
    assert "a limit of 0.5 of them" in found["processors"].found
    assert found["NUMA"].state == "lost"
    assert "2 nodes" in found["NUMA"].found
    assert "numactl" in found["NUMA"].how
    assert found["memory"].found == "8 GiB, 4 GiB of it available; this container may take 2 GiB"
    assert found["memory"].data == {"total": 2 << 30, "available": 2 << 30}


def test_without_limits_all_is_fine(machine):
    (machine / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    (machine / "sys/fs/cgroup/memory.max").write_text("max\n")
    (machine / "sys/devices/system/node/node1").rmdir()
    found = by_what(processor.look(machine))
    assert found["NUMA"].state == "ok"
    assert found["memory"].found == "8 GiB, 4 GiB of it available"
    assert found["processors"].data["quota"] is None


@pytest.mark.parametrize(
    ("release", "limit", "state"),
    [
        ("5.10.0-1", 64 << 10, "lost"),
        ("5.10.0-1", resource.RLIM_INFINITY, "ok"),
        ("5.15.0", 64 << 10, "ok"),
    ],
)
def test_memlock_matters_where_the_kernel_counts_rings(monkeypatch, machine, release, limit, state):
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    found = by_what(processor.look(machine))
    assert found["memlock"].state == state
    assert (state == "lost") != ("new_cpu_locked_tensor may lock that much" in found["memlock"].found)
    assert found["system"].state == "ok"


def test_an_old_kernel_cannot_work(monkeypatch, machine):
    monkeypatch.setattr("platform.release", lambda: "5.4.0")
    assert by_what(processor.look(machine))["system"].state == "broken"


@pytest.mark.parametrize(("isa", "state"), [("avx512", "ok"), ("avx2", "ok"), ("baseline", "lost")])
def test_instructions_are_those_of_the_kernels(monkeypatch, machine, isa, state):
    monkeypatch.setattr(_core, "instruction_set", lambda: isa)
    found = by_what(processor.look(machine))["instructions"]
    assert (found.state, found.data["instructions"]) == (state, isa)


# --- GPUs ------------------------------------------------------------------------------------------------------------


class OneGpu:
    """A device of compute capability 9.0."""

    name, architecture = "H200", 90

    def __init__(self, number):
        self.device = number

    def memory(self):
        return 100 << 30, 140 << 30


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(_core, "probe_cuda", lambda: SimpleNamespace(version=(13, 0), devices=1, problem=None))
    monkeypatch.setattr(_core, "CudaContext", OneGpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_gpu_with_machine_code_in_the_wheel(one_gpu, monkeypatch):
    monkeypatch.setattr(shipped, "shipped", lambda source, device: SimpleNamespace(compiler=(13, 0)))
    found = by_what(gpus.look())
    assert found["GPU 0"].found == "H200, sm_90, 140 GiB, 100 GiB of it free"
    assert "comes with zeroxide" in found["GPU 0: kernels"].found
    assert {each.state for each in found.values()} == {"ok"}


def test_a_gpu_without_machine_code_needs_the_compiler(one_gpu, monkeypatch):
    monkeypatch.setattr(shipped, "shipped", lambda source, device: SimpleNamespace(compiler=(14, 0)))
    monkeypatch.setattr("zeroxide.kernels.compile.compiler", lambda: SimpleNamespace(version=(13, 1)))
    assert by_what(gpus.look())["GPU 0: kernels"].found.startswith("NVRTC 13.1")

    def none():
        raise DeviceError("no NVRTC")

    monkeypatch.setattr("zeroxide.kernels.compile.compiler", none)
    found = by_what(gpus.look())["GPU 0: kernels"]
    assert (found.state, "no NVRTC" in found.found) == ("lost", True)


def test_a_torch_that_does_not_fit_the_driver_is_told(one_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    found = by_what(gpus.look())["torch and the GPU"]
    assert (found.state, "14.0" in found.how) == ("lost", True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU" in by_what(gpus.look())["torch and the GPU"].found


def test_no_gpu_is_no_loss(monkeypatch):
    monkeypatch.setattr(
        _core, "probe_cuda", lambda: SimpleNamespace(version=None, devices=0, problem="no CUDA driver: x (y); install")
    )
    (found,) = gpus.look()
    assert (found.state, found.found) == ("ok", "none: the model computes in host memory (no CUDA driver: x)")


def test_a_device_that_cannot_be_opened_is_broken(one_gpu, monkeypatch):
    def busy(number):
        raise DeviceError("device 0 is busy")

    monkeypatch.setattr(_core, "CudaContext", busy)
    assert by_what(gpus.look())["GPU 0"].state == "broken"


# --- software --------------------------------------------------------------------------------------------------------


def test_versions_are_those_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def least(lines):
        return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in lines)

    assert least(project["dependencies"]) == software.NEEDED
    train = least(project["optional-dependencies"]["train"])
    train.pop("typer")  # without which there is no command at all
    assert train == software.USED


def test_what_is_missing_or_too_old_is_named(monkeypatch):
    there = {"torch": "2.8.1", "numpy": "2.0", "pydantic": "2.10", "safetensors": "0.6.0", "deepspeed": "0.19.8"}
    monkeypatch.setattr(software, "_version", there.get)
    monkeypatch.setattr(software, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: "/site"))
    found = by_what(software.look())
    assert (found["torch"].state, found["torch"].how) == ("broken", "pip install 'torch>=2.9'")
    assert found["pydantic"].state == "ok"
    monkeypatch.setattr(software, "_version", {**there, "pydantic": "2.9", "torch": "2.10"}.get)
    assert {each.what for each in software.look() if each.state == "broken"} == {"pydantic"}
    monkeypatch.setattr(software, "_version", there.get)
    assert (found["transformers"].state, "zeroxide[train]" in found["transformers"].how) == ("lost", True)
    assert "trl" not in found
    assert found["DeepSpeed itself"].found.startswith("0.19.8 in /site")
    monkeypatch.setattr(software, "_version", {**there, "deepspeed": "0.19.8+zeroxide"}.get)
    assert "not installed" in by_what(software.look())["DeepSpeed itself"].found


def test_the_file_that_gives_the_name_is_looked_for(monkeypatch):
    monkeypatch.setattr("site.getsitepackages", lambda: ["/nowhere"])
    monkeypatch.setattr("site.getusersitepackages", lambda: "/nowhere")
    found = by_what(software.look())["the name deepspeed"]
    assert (found.state, "zeroxide.pth is missing" in found.found) == ("lost", True)

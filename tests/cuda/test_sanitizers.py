"""Kernels under the address and undefined-behaviour sanitizers, which see reads beyond a tensor that no guard does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import COMPILER, CUDA, WHY_NOT, Builds

import zeroxide.kernels

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
# adagrad, adam and sgd are the template that lion is an instance of, with arithmetic of their own and no addresses.
SOURCES = ("accumulate", "cast", "cross_entropy", "lion", "norm", "permute", "quantise")


def runtime_libraries() -> list[str]:
    """Where the sanitizers' libraries are; a name without a folder where g++ has none."""
    if COMPILER is None:
        return []
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    return [each.stdout.strip() for each in found]


LIBRARIES = runtime_libraries()
missing = not LIBRARIES or not all(Path(each).is_absolute() for each in LIBRARIES)
pytestmark = pytest.mark.skipif(missing, reason=WHY_NOT if COMPILER is None else "g++ comes without sanitizers")

THREAD = ("-fsanitize=thread", "-g1", "-Wno-tsan")
# gcc 12's race detector wants addresses that are not random.
FIXED = ["setarch", "-R"] if shutil.which("setarch") else []


def run(sources: dict[str, Path]) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(LIBRARIES),
        # Python and torch keep memory until they end. Fibers are told to the sanitizer at every switch.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    }
    words = [f"{name}={path.name}" for name, path in sources.items()]
    folder = next(iter(sources.values())).parent
    command = [sys.executable, Path(__file__).with_name("sanitized.py"), folder, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_kernels_under_sanitizers(tmp_path):
    """The sources as they are, and one that reads a tensor's end: that is reported."""
    builds = Builds(tmp_path, FLAGS)
    ended = run(builds.build_all(SOURCES))
    assert ended.returncode == 0, ended.stderr
    left_out = ("update_adagrad", "update_adam", "update_sgd")
    expected = [case.name for case in zeroxide.kernels.ALL if not case.name.startswith(left_out)]
    assert ended.stdout.split() == [*expected, "done"]

    path = "include/zx/pack.cuh"
    text = (CUDA / path).read_text().replace("at < left ? from[at] : T{}", "from[at]")
    ended = run({"accumulate": builds.build("accumulate", {path: text})})
    assert ended.returncode != 0
    assert "heap-buffer-overflow" in ended.stderr


def test_a_race_detector_sees_no_race_and_one_that_is_there(tmp_path):
    """Its barriers are those of the emulator: without one, what a lane reads was written by no lane before it."""
    builds = Builds(tmp_path, THREAD)
    text = (CUDA / "kernels" / "norm.cu").read_text()
    assert text.count("    __syncthreads();\n") == 1
    for name, source in (("norm", text), ("racing", text.replace("    __syncthreads();\n", ""))):
        kernel, program = tmp_path / f"{name}.cu", tmp_path / name
        kernel.write_text(source)
        kernels = ["-I", CUDA / "include", "-include", builds.prefix, "-x", "c++", kernel]
        builds.compile([*kernels, "-c", "-o", tmp_path / f"{name}.o"])
        main = Path(__file__).with_name("norm_races.cpp")
        builds.compile([main, tmp_path / f"{name}.o", builds.runtime, "-o", program])
        ended = subprocess.run([*FIXED, program], capture_output=True, text=True, timeout=100)
        if "unexpected memory mapping" in ended.stderr:
            pytest.skip("the race detector does not run with this kernel's random addresses")
        if name == "norm":
            assert (ended.returncode, ended.stderr) == (0, "")
        else:
            assert "data race" in ended.stderr
            assert "zx_norm_total" in ended.stderr

"""Kernels under the address and undefined-behaviour sanitizers, which see reads beyond a tensor that no guard does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import COMPILER, CUDA, WHY_NOT, Builds
from emulated import SOURCES as EVERY

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

RACED = ["cross_entropy", "norm"]
"""All sources whose lanes read what others wrote."""
HEADERS = sorted((CUDA / "include" / "zx").iterdir())

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


@dataclass(frozen=True)
class Unordered:
    """A barrier that is left out of a source, and the kernel in which the detector must see a race then."""

    source: str
    barrier: str
    kernel: str

    @property
    def text(self) -> str:
        whole = (CUDA / "kernels" / f"{self.source}.cu").read_text()
        assert whole.count(self.barrier) == 1
        return whole.replace(self.barrier, self.barrier.split("\n", 1)[1])


UNORDERED = [
    Unordered("norm", "    __syncthreads();\n", "zx_norm_total"),
    Unordered("norm", "            __syncwarp();\n            if (number + 1 < whole)", "zx_norm_chunks"),
    Unordered("norm", "            __syncwarp();\n        }\n", "zx_norm_chunks"),
    Unordered("cross_entropy", "        __syncthreads();\n        if (threadIdx.x == 0)", "zx_cross_entropy"),
    Unordered("cross_entropy", "        __syncthreads();\n    }\n", "zx_cross_entropy"),
]
SHARING = re.compile(r"\b(?:ZX_SHARED|__syncthreads|__syncwarp)\b")


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """What the detector says of sources as they are, by name, and of those that lack a barrier, by number."""
    folder = tmp_path_factory.mktemp("races")
    builds = Builds(folder, THREAD)
    main = folder / "races.o"
    assert builds.prefix.exists()
    assert builds.runtime.exists()
    builds.compile([Path(__file__).with_name("races.cpp"), "-c", "-o", main])

    def race(name, source, text):
        kernel, program = folder / f"{name}.cu", folder / name
        kernel.write_text(text)
        made = ["-I", CUDA / "include", "-include", builds.prefix, "-x", "c++", kernel, "-x", "none"]
        builds.compile([*made, main, builds.runtime, "-o", program])
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        command = [*FIXED, program, source]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    given = [(each, each, (CUDA / "kernels" / f"{each}.cu").read_text()) for each in RACED]
    given += [(str(at), each.source, each.text) for at, each in enumerate(UNORDERED)]
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda each: race(*each), given))
    if any("unexpected memory mapping" in each.stderr for each in ended):
        pytest.skip("the race detector does not run with this kernel's random addresses")
    return dict(zip([name for name, _, _ in given], ended, strict=True))


def test_all_whose_lanes_share_memory_are_under_the_race_detector():
    """Catches: a source whose lanes begin to read what others write."""
    sharing = [each for each in EVERY if SHARING.search((CUDA / "kernels" / f"{each}.cu").read_text())]
    assert sharing == RACED
    assert not any(SHARING.search(path.read_text()) for path in HEADERS if path.name != "portable.cuh")


@pytest.mark.parametrize("source", RACED)
def test_the_race_detector_sees_no_race(raced, source):
    """Its barriers are those of the emulator. In every order of lanes, every kernel of the source."""
    ended = raced[source]
    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(ended.stdout.split()) == {each.entry for each in zeroxide.kernels.KERNELS if each.source == source}


@pytest.mark.parametrize("at", range(len(UNORDERED)))
def test_the_race_detector_sees_a_barrier_that_is_missing(raced, at):
    """Without it, what a lane reads was written by no lane before it. Catches: a run that shares nothing."""
    ended = raced[str(at)]
    assert ended.returncode != 0
    assert "data race" in ended.stderr
    assert UNORDERED[at].kernel in ended.stderr

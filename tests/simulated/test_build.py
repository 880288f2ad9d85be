"""The library is built once for what it is made from, by one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulated import build

COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "a compiler $VERSION" && exit
echo "$@" >> {log}
sleep 0.05
for each; do target="$each"; done
echo built > "$target"
case "$*" in *"$BREAKS"*) [ "$BREAKS" ] && echo "an error" >&2 && exit 1;; esac
true
"""

BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from simulated import build
build.SOURCES, build.CACHE = Path(sys.argv[2]), Path(sys.argv[3])
print(build.library())
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A compiler that takes down what it is asked, sources, and how to ask for the library in a new process."""
    log, sources, cache = tmp_path / "log", tmp_path / "src", tmp_path / "cache"
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    sources.mkdir()
    for part in build.PARTS:
        (sources / f"{part}.cpp").write_text(part)
    (sources / "shared.h").write_text("shared")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("VERSION", "1")

    def start():
        command = [sys.executable, "-c", BUILD, str(Path(__file__).parents[1]), str(sources), str(cache)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def built(processes):
        log.write_text("")
        ended = [(*each.communicate(timeout=60), each.returncode) for each in [start() for _ in range(processes)]]
        return ended, log.read_text().splitlines()

    return sources, built


def test_one_of_two_processes_builds(world):
    _, built = world
    ended, lines = built(2)
    assert len(lines) == len(build.PARTS) + 1
    assert [code for *_, code in ended] == [0, 0]
    assert ended[0][0] == ended[1][0]
    assert Path(ended[0][0].strip()).read_text() == "built\n"
    assert built(1)[1] == []


def test_what_has_changed_is_built_anew(world, monkeypatch):
    sources, built = world
    (first,), _ = built(1)
    (sources / "order.cpp").write_text("other")
    (second,), lines = built(1)
    assert [Path(line.split()[-3]).name for line in lines[:-1]] == ["order.cpp"]
    assert second[0] != first[0]
    (sources / "shared.h").write_text("other")
    assert len(built(1)[1]) == len(build.PARTS) + 1
    monkeypatch.setenv("VERSION", "2")
    assert len(built(1)[1]) == len(build.PARTS) + 1


def test_what_does_not_build_says_so_and_is_not_there(world, monkeypatch):
    _, built = world
    monkeypatch.setenv("BREAKS", "order.cpp")
    (out, error, code), *_ = built(1)[0]
    assert (out, code) == ("", 1)
    assert "RuntimeError: the simulated device does not build: -std=c++20" in error
    assert error.endswith("an error\n\n")
    monkeypatch.delenv("BREAKS")
    (out, error, code), *_ = built(1)[0]
    assert (error, code) == ("", 0)
    assert Path(out.strip()).read_text() == "built\n"

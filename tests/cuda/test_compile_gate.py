"""Every kernel compiles for every architecture, without a warning, within its budget of registers, spilling nothing."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import nvrtc
import pytest
from emulated import CUDA, SOURCES
from nvrtc import ARCHITECTURES, CompileError, compiled, disassembler, wide_in_cubin, wide_in_ptx

import zeroxide.kernels

BUDGETS = json.loads((CUDA / "budgets.json").read_text())

needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc() is None, reason=nvrtc.WHY_NOT)


def text_of(source: str) -> str:
    return (CUDA / "kernels" / f"{source}.cu").read_text()


def problems(source: str, made: nvrtc.Compiled, architecture: str) -> list[str]:
    """What a compiled source does not keep of its budget."""
    budget = BUDGETS[source]
    found = [line for line in made.log.splitlines() if "warning" in line]
    if made.registers.keys() != budget.keys():
        found.append(f"entry points {sorted(made.registers.keys() ^ budget.keys())}")
    wide = wide_in_ptx(made.ptx)
    for name in budget.keys() & made.registers.keys():
        if made.registers[name] > budget[name]["registers"][architecture]:
            found.append(f"{name}: {made.registers[name]} registers")
        if made.spilled[name]:
            found.append(f"{name}: {made.spilled[name]} bytes spilled")
        if budget[name]["memory_bound"] and not wide.get(name):
            found.append(f"{name}: no 16-byte load or store")
    return found


@pytest.fixture(scope="module")
def everything():
    """(source, architecture) -> what becomes of it, two at a time from the beginning on."""
    pool = ThreadPoolExecutor(2)
    every = itertools.product(SOURCES, ARCHITECTURES)
    yield {(source, target): pool.submit(compiled, source, text_of(source), target) for source, target in every}
    pool.shutdown(cancel_futures=True)


@needs_nvrtc
@pytest.mark.parametrize(("source", "architecture"), [*itertools.product(SOURCES, ARCHITECTURES)])
def test_compiles_within_its_budget(everything, source, architecture, tmp_path):
    """Catches: what only a GPU's compiler refuses, a spill, more registers, a lost entry point, narrow loads."""
    made = everything[source, architecture].result()
    assert made.cubin[:4] == b"\x7fELF"
    assert problems(source, made, architecture) == []
    if disassembler():
        wide = wide_in_cubin(made.cubin, tmp_path)
        narrow = [name for name, each in BUDGETS[source].items() if each["memory_bound"] and not wide[name]]
        assert narrow == []


def test_every_source_has_a_budget():
    assert sorted(BUDGETS) == SOURCES


@needs_nvrtc
def test_the_gate_closes():
    """A spill, registers above the budget, a new entry point, a warning, an error: each is told."""
    text = text_of("norm")
    assert problems("norm", compiled("norm", text, "sm_90"), "sm_90") == []
    more = text + "\nZX_KERNEL(zx_more, zx::NormChunksArgs, 32) { args.chunk_sums[0] = 1; }\n"
    assert problems("norm", compiled("norm", more, "sm_90"), "sm_90") == ["entry points ['zx_more']"]
    unused = text.replace("using namespace zx;", "using namespace zx; int unused;", 1)
    assert any("warning" in each for each in problems("norm", compiled("norm", unused, "sm_90"), "sm_90"))
    scalar = text.replace("is_aligned<Bits, WIDE>(data) ? elements / TILE : 0;", "false;")
    assert any("16-byte" in each for each in problems("norm", compiled("norm", scalar, "sm_90"), "sm_90"))
    with pytest.raises(CompileError, match=r"norm for sm_90: norm\.cu\(\d+\): error"):
        compiled("norm", text.replace("__syncthreads();", "__syncthread();"), "sm_90")


def test_wrappers_name_every_entry_point():
    """Catches: an entry point that no wrapper launches, and a wrapper of one that is not there."""
    named = {}
    for kernel in zeroxide.kernels.KERNELS:
        named.setdefault(kernel.source, set()).add(kernel.entry)
    assert named == {source: set(each) for source, each in BUDGETS.items()}

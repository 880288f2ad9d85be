"""Every kernel compiles for every architecture, without a warning, within its budget of registers, spilling nothing."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import nvrtc
import pytest
from emulated import CUDA, SOURCES
from nvrtc import ARCHITECTURES, compiled, disassembler, text_of, wide_by_disassembler, wide_in_code

import zeroxide.kernels
from zeroxide.errors import DeviceError

BUDGETS = json.loads((CUDA / "budgets.json").read_text())

needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc() is None, reason=nvrtc.WHY_NOT)


def problems(source: str, made: nvrtc.Compiled, architecture: int) -> list[str]:
    """What a compiled source does not keep of its budget."""
    budget = BUDGETS[source]
    found = [line for line in made.log.splitlines() if "warning" in line]
    if made.registers.keys() != budget.keys():
        found.append(f"entry points {sorted(made.registers.keys() ^ budget.keys())}")
    wide = wide_in_code(made.cubin)
    for name in budget.keys() & made.registers.keys():
        if made.registers[name] > budget[name]["registers"][f"sm_{architecture}"]:
            found.append(f"{name}: {made.registers[name]} registers")
        if made.spilled[name]:
            found.append(f"{name}: {made.spilled[name]} bytes spilled")
        if budget[name]["memory_bound"] and not wide[name]:
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
def test_compiles_within_its_budget(everything, source, architecture):
    """Catches: what only a GPU's compiler refuses, a spill, more registers, a lost entry point, narrow loads."""
    made = everything[source, architecture].result()
    assert made.cubin[:4] == b"\x7fELF"
    assert problems(source, made, architecture) == []


@needs_nvrtc
@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_is_read_as_nvidia_reads_it(everything, architecture, tmp_path):
    """Catches: wide loads that are counted where there are none, and an architecture that writes them otherwise."""
    made = everything["permute", architecture].result()
    expected = wide_by_disassembler(made.cubin, tmp_path)
    assert wide_in_code(made.cubin) == expected
    assert sum(expected.values()) > 0


def test_every_source_has_a_budget():
    assert sorted(BUDGETS) == SOURCES


@needs_nvrtc
def test_the_gate_closes():
    """A spill, registers above the budget, a new entry point, a warning, an error: each is told."""
    text = text_of("norm")
    assert problems("norm", compiled("norm", text, 90), 90) == []
    more = text + "\nZX_KERNEL(zx_more, zx::NormChunksArgs, 32) { args.chunk_sums[0] = 1; }\n"
    assert problems("norm", compiled("norm", more, 90), 90) == ["entry points ['zx_more']"]
    unused = text.replace("using namespace zx;", "using namespace zx; int unused;", 1)
    assert any("warning" in each for each in problems("norm", compiled("norm", unused, 90), 90))
    scalar = text.replace("is_aligned<Bits, WIDE>(data) ? elements / TILE : 0;", "false;")
    assert any("16-byte" in each for each in problems("norm", compiled("norm", scalar, 90), 90))
    with pytest.raises(DeviceError, match=r"refuses norm\.cu for sm_90: norm\.cu\(\d+\): error"):
        compiled("norm", text.replace("__syncthreads();", "__syncthread();"), 90)


def test_wrappers_name_every_entry_point():
    """Catches: an entry point that no wrapper launches, and a wrapper of one that is not there."""
    named = {}
    for kernel in zeroxide.kernels.KERNELS:
        named.setdefault(kernel.source, set()).add(kernel.entry)
    assert named == {source: set(each) for source, each in BUDGETS.items()}

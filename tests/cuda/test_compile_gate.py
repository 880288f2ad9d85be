"""Every kernel compiles for every architecture, without a warning, within its budget of registers, spilling nothing."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import nvrtc
import pytest
from emulated import CUDA, SOURCES
from nvrtc import (
    ARCHITECTURES,
    UnknownToDisassembler,
    Wide,
    compiled,
    disassembler,
    text_of,
    wide_by_disassembler,
    wide_in_code,
)

import zeroxide.kernels
from zeroxide.errors import DeviceError

BUDGETS = json.loads((CUDA / "budgets.json").read_text())

needs_nvrtc = pytest.mark.skipif(nvrtc.nvrtc() is None, reason=nvrtc.WHY_NOT)
needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="nvdisasm is not installed: triton, which torch's CUDA wheels bring, has it"
)


NOT_BOUND_BY_MEMORY = {"zx_norm_pieces", "zx_norm_total"}
"""They read one number for each 4096 gradients and more."""


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
        for kind in ("loads", "stores"):
            if getattr(wide[name], kind) < budget[name][f"wide_{kind}"]:
                found.append(f"{name}: {getattr(wide[name], kind)} 16-byte {kind}")
    return found


@pytest.fixture(scope="module")
def pool():
    """Two at a time, in the order in which work is given."""
    threads = ThreadPoolExecutor(2)
    yield threads
    threads.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def everything(pool):
    """(source, architecture) -> what becomes of it, from the beginning on."""
    every = itertools.product(SOURCES, ARCHITECTURES)
    return {(source, target): pool.submit(compiled, source, text_of(source), target) for source, target in every}


@pytest.fixture(scope="module")
def disassembled(pool, everything, tmp_path_factory):
    """The same -> what `nvdisasm` sees in it. What it reads is compiled before it."""
    folder = tmp_path_factory.mktemp("cubins")

    def read(made):
        return wide_by_disassembler(made.result().cubin, folder)

    return {each: pool.submit(read, made) for each, made in everything.items()}


@needs_nvrtc
@pytest.mark.parametrize(("source", "architecture"), [*itertools.product(SOURCES, ARCHITECTURES)])
def test_compiles_within_its_budget(everything, source, architecture):
    """Catches: what only a GPU's compiler refuses, a spill, more registers, a lost entry point, narrow loads."""
    made = everything[source, architecture].result()
    assert made.cubin[:4] == b"\x7fELF"
    assert problems(source, made, architecture) == []


@needs_nvrtc
@needs_disassembler
@pytest.mark.parametrize(("source", "architecture"), [*itertools.product(SOURCES, ARCHITECTURES)])
def test_sixteen_bytes_in_the_disassembly(everything, disassembled, source, architecture):
    """NVIDIA's disassembler sees the wide loads and stores of every kernel that is bound by memory, and `wide_in_code`
    the same. Catches: scalar accesses, and an architecture that writes wide ones otherwise."""
    try:
        seen = disassembled[source, architecture].result()
    except UnknownToDisassembler as error:
        pytest.skip(str(error))
    budget = BUDGETS[source]
    assert seen.keys() == budget.keys()
    narrow = {
        name: each
        for name, each in seen.items()
        if each.loads < budget[name]["wide_loads"] or each.stores < budget[name]["wide_stores"]
    }
    assert narrow == {}
    assert wide_in_code(everything[source, architecture].result().cubin) == seen


@needs_nvrtc
@needs_disassembler
def test_narrow_accesses_are_seen(tmp_path):
    """In one entry point of one source, by both ways of reading; and an unknown architecture is no failure."""
    text = text_of("norm")
    scalar = text.replace("is_aligned<Bits, WIDE>(data) ? elements / TILE : 0;", "0;")
    assert scalar != text
    made = compiled("norm", scalar, 90).cubin
    assert wide_by_disassembler(made, tmp_path)["zx_norm_chunks_f32"] == Wide(0, 0)
    assert wide_in_code(made)["zx_norm_chunks_f32"] == Wide(0, 0)
    # Bits 8 to 15 of the flags in an ELF header are the compute capability, here one of no GPU.
    with pytest.raises(UnknownToDisassembler, match="SM255"):
        wide_by_disassembler(made[:49] + b"\xff" + made[50:], tmp_path)


def test_every_source_has_a_budget():
    """One of wide accesses in every kernel that is bound by memory."""
    assert sorted(BUDGETS) == SOURCES
    every = {name: budget for of_source in BUDGETS.values() for name, budget in of_source.items()}
    none = {name for name, budget in every.items() if not budget["wide_loads"] + budget["wide_stores"]}
    assert none == NOT_BOUND_BY_MEMORY


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

"""The writer of checkpoint files, and the memory that saving takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from zeroxide.checkpoint.format.cutting import Tensor, cut_into_files, whole
from zeroxide.checkpoint.format.stream import DTYPES, Entry, StreamWriter

# The writer --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), max_size=6),
    st.integers(1, 40),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=5),
)
def test_written_files_are_read_by_the_reference_library(tmp_path_factory, tensors, chunk, suffix):
    path = tmp_path_factory.mktemp("stream") / "file.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = sorted(tensors, key=lambda pair: -DTYPES[pair[1]].itemsize)
    values = []
    for shape, name in tensors:
        dtype = DTYPES[name]
        # A file counts two elements for one of torch's along the last dimension, which a scalar has not.
        shape = shape or ((1,) if name == "F4" else ())
        numel = int(np.prod(shape, dtype=int))
        raw = torch.randint(0, 2, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        values.append(raw.view(dtype).view(shape) if numel else torch.empty(shape, dtype=dtype))
    entries = [Entry(f"{at}{suffix}", value.dtype, tuple(value.shape)) for at, value in enumerate(values)]
    with StreamWriter(path, entries, {"format": "pt"}) as writer:
        for value in values:
            for piece in value.flatten().split(chunk):
                writer.write(piece)
        writer.finish()
    assert writer.bytes == path.stat().st_size
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {entry.key for entry in entries}
        for entry, value in zip(entries, values, strict=True):
            found = file.get_tensor(entry.key)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8))


def test_a_writer_that_was_not_fed_everything_does_not_finish(tmp_path):
    entries = [Entry("a", torch.float32, (3,)), Entry("b", torch.bfloat16, (2,))]
    with StreamWriter(tmp_path / "one", entries, {}) as writer:
        writer.write(torch.ones(3))
        with pytest.raises(AssertionError, match="b is not complete"):
            writer.finish()
    with StreamWriter(tmp_path / "two", entries, {}) as writer:
        with pytest.raises(AssertionError, match="a has 12 bytes left"):
            writer.write(torch.ones(4))
        with pytest.raises(AssertionError, match=r"a takes torch\.float32"):
            writer.write(torch.ones(2, dtype=torch.bfloat16))


def test_short_writes_go_on(tmp_path, monkeypatch):
    import os

    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: max(1, len(data) // 3)]))
    with StreamWriter(tmp_path / "file", [Entry("a", torch.float32, (1000,))], {}) as writer:
        writer.write(torch.arange(1000.0))
        writer.finish()
    assert load_file(tmp_path / "file")["a"].equal(torch.arange(1000.0))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, st.sampled_from(["F32", "BF16", "I64", "BOOL"])), max_size=8),
    st.integers(1, 300),
    st.booleans(),
)
def test_cutting_covers_every_element_once(tensors, limit, pieces):
    tensors = [Tensor(f"t{at}", DTYPES[name], shape) for at, (shape, name) in enumerate(tensors)]
    files = cut_into_files(whole(tensors), limit, pieces=pieces)
    seen = {tensor.name: [] for tensor in tensors}
    for cuts in files:
        assert cuts
        size = sum(cut.entry.bytes for cut in cuts)
        assert size <= limit or len([cut for cut in cuts if cut.entry.bytes]) == 1
        if pieces and limit >= 8:
            assert size <= limit
        widths = [cut.tensor.dtype.itemsize for cut in cuts]
        assert widths == sorted(widths, reverse=True)
        for cut in cuts:
            seen[cut.tensor.name] += range(cut.start, cut.start + cut.count)
    assert seen == {tensor.name: list(range(tensor.numel)) for tensor in tensors}


# Memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, zeroxide
from torch import nn
from pathlib import Path

def hwm():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

class Source:
    def fill(self, tensors, modules):
        for tensor in tensors.values():
            tensor.fill_(0.25)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(12)])
    def forward(self, x):
        for item in self.items:
            x = item(x)
        return x.sum()

with torch.device("meta"):
    model = Model()
folder = Path(sys.argv[1])
engine, *_ = zeroxide.initialize(model=model, lr=1e-3, offload=f"nvme:{folder}", dtype="bf16", weights=Source(),
                                 config={"zeroxide": {"staging_bytes": 16 << 20, "tile_bytes": 1 << 20}})
engine.backward(engine(torch.ones(1, 2048, dtype=torch.bfloat16)))
engine.step()
import zeroxide.checkpoint.save.save, zeroxide.checkpoint.load.load, zeroxide.checkpoint.convert.export
for act in ("save_checkpoint", "save_16bit_model", "load_checkpoint"):
    Path("/proc/self/clear_refs").write_text("5")
    before = hwm()
    getattr(engine, act)(folder / "out")
    print(act, hwm() - before)
engine.destroy()
"""


def test_memory_stays_small(tmp_path):
    """48 M parameters: 576 MB in files. Loading may also hold one part of one unit (16 MiB), as the core fills it."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if " " in line}
    assert grown["save_checkpoint"] < 16, grown
    assert grown["save_16bit_model"] < 16, grown
    assert grown["load_checkpoint"] < 16 + 16, grown

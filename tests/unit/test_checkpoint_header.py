"""Headers of safetensors files: taken and refused as the reference implementation does."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from zeroxide.checkpoint.format.header import read_header


def read(data):
    descriptor = os.memfd_create("test")
    try:
        os.write(descriptor, data)
        return read_header(descriptor)
    finally:
        os.close(descriptor)


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def judged_by_reference(data):
    try:
        return {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in deserialize(data)}
    except SafetensorError:
        return None


def judged_here(data):
    try:
        found = read(data)
    except ValueError as error:
        return None if "\n" not in str(error) and len(str(error)) <= 200 else error
    return {name: (each.dtype, each.shape, data[each.begin : each.end]) for name, each in found.items()}


NUMBERS = st.sampled_from([0, 4, 8, 12, 16, 24, -4, 1 << 40, 1 << 63, 1 << 64, 2.0, "8", None, True])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F32", "F32", "BF16", "F8_E4M3", "I64", "F4", "F99", "f32", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 2, 4, -1, 1 << 62, 2.0, None]), max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"more": st.just(1)},
)
GOOD = st.tuples(st.sampled_from(["F32", "I32"]), st.integers(0, 3), st.integers(0, 2))


@st.composite
def nearly_good(draw):
    """Tensors back to back, a change or two in the offsets, and a few bytes more or less."""
    header, at = {}, 0
    for number, (dtype, rows, shift) in enumerate(draw(st.lists(GOOD, max_size=4))):
        begin = at + draw(st.sampled_from([0, 0, 0, 0, 4 * shift, -4 * shift]))
        at = begin + rows * 8
        header[f"t{number}"] = {"dtype": dtype, "shape": [rows, 2], "data_offsets": [begin, at]}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([{"format": "pt"}, {"a": 1}, [], None, {}]))
    return file_of(header, bytes(range(max(0, at + draw(st.sampled_from([0, 0, 0, 4, -4]))))))


ODD = st.one_of(
    nearly_good(),
    st.builds(file_of, st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), st.binary(max_size=40)),
    st.builds(file_of, st.binary(max_size=30), st.binary(max_size=8)),
    st.binary(max_size=20),
)


@settings(max_examples=500, deadline=None)
@given(ODD)
def test_headers_are_judged_as_by_the_reference(data):
    assert judged_here(data) == judged_by_reference(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{}",
        file_of(b"[" * 200_000),
        file_of(b'{"a":' * 50_000),
        file_of(b"\xff\xfe"),
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12)),
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
    ],
)
def test_odd_headers_are_refused(data):
    assert judged_by_reference(data) is None
    assert judged_here(data) is None


def test_places_are_those_of_the_bytes():
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.arange(4).to(torch.float8_e5m2),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int64),
    }
    data = save(tensors, {"format": "pt"})
    found = read(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert (
            data[found[name].begin : found[name].end]
            == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    assert (found["b"].dtype, found["scalar"].dtype) == ("F8_E5M2", "I64")


def test_a_disk_that_fails_is_an_oserror(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="directory"):
            read_header(descriptor)
    finally:
        os.close(descriptor)

"""Python values as JSON and back without a silent change: tuples, dicts with any plain keys and Counters survive.

What JSON has no form for is written as a dict with one key that starts with a dollar sign:

    (1, 2)         {"$tuple": [1, 2]}
    {3: "x"}       {"$dict": [[3, "x"]]}
    Counter(...)   {"$counter": [[3, 1]]}
    a tensor       {"$tensor": ["float32", [2], "AACAPwAAAEA="]}, its bytes in base64
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from typing import Any

import torch

from zeroxide.device.placement import HOST, in_host
from zeroxide.errors import CheckpointError
from zeroxide.precision.bits import bytes_of, tensor_of, why_not_bytes

__all__ = ["decode", "encode"]

TUPLE, DICT, COUNTER, TENSOR = "$tuple", "$dict", "$counter", "$tensor"
MAX_DEPTH = 100
MAX_TENSOR = 1 << 16
"""Bytes of a tensor: scores and counts, not weights."""


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as JSON can hold it. Raises CheckpointError that names the place of what it cannot hold."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where[:60]}... is nested more than {MAX_DEPTH} deep: it cannot be saved as JSON")
    if value is None or isinstance(value, bool):
        return value
    # Subclasses such as numpy.float64 become the plain type, which holds the same value.
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, torch.Tensor):
        return {TENSOR: _encoded(value, where)}
    if isinstance(value, list):
        return [encode(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(value)]
    if isinstance(value, tuple):
        return {TUPLE: [encode(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(value)]}
    if isinstance(value, dict):
        plain_keys = all(type(key) is str for key in value)
        if type(value) is not Counter and plain_keys and not any(key.startswith("$") for key in value):
            return {key: encode(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
        pairs = [
            [encode(key, f"a key of {where}", depth + 1), encode(item, f"{where}[{key!r}]", depth + 1)]
            for key, item in value.items()
        ]
        return {COUNTER if type(value) is Counter else DICT: pairs}
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise CheckpointError(
        f"{where} is a {kind}: a checkpoint holds numbers, strings, None, lists, tuples and dicts of them; "
        "convert it first"
    )


def _encoded(tensor: torch.Tensor, where: str) -> list[Any]:
    problem = why_not_bytes(tensor)
    if problem is not None or tensor.nbytes > MAX_TENSOR:
        problem = problem or f"has {tensor.nbytes} bytes: at most {MAX_TENSOR} are saved as JSON"
        raise CheckpointError(f"{where} {problem}; save large tensors as buffers of the model")
    data = bytes_of(in_host(tensor.detach()).contiguous())
    return [
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        base64.b64encode(data.numpy().tobytes()).decode(),
    ]


def _decoded(form: Any) -> torch.Tensor:
    try:
        name, shape, text = form
        dtype = getattr(torch, name)
        raw = torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8, device=HOST)
        return tensor_of(raw, dtype, torch.Size(shape))
    except (TypeError, AttributeError, RuntimeError, binascii.Error) as error:
        raise ValueError(f"no tensor: {error}") from None


def decode(value: Any) -> Any:
    """The value that `encode` was given. Raises ValueError for a form that `encode` never makes."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (form, inner), *_ = value.items()
        if form == TUPLE:
            return tuple(decode(item) for item in inner)
        if form == TENSOR:
            return _decoded(inner)
        if form in (DICT, COUNTER):
            pairs = {decode(key): decode(item) for key, item in inner}
            return Counter(pairs) if form == COUNTER else pairs
    return {key: decode(item) for key, item in value.items()}

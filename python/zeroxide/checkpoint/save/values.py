"""The values of a checkpoint's files, pulled out of the core as they are written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zeroxide.checkpoint.live_state import LiveState
from zeroxide.checkpoint.save.description import BUFFERS, Description
from zeroxide.device.placement import in_host
from zeroxide.precision.bits import bytes_of

__all__ = ["values"]


def values(description: Description, live: LiveState) -> Iterator[torch.Tensor]:
    """The elements of all files, in order, as they are stored. Each tensor is valid until the next one is taken."""
    for name, cuts in description.files:
        family = name.partition("-")[0]
        for cut in cuts:
            if family != BUFFERS:
                held, start = description.held(cut)
                yield from live.chunks(held, family, start, cut.count, cut.tensor.dtype)
            else:
                flat = in_host(bytes_of(description.buffers[cut.tensor.name])).view(cut.tensor.dtype)
                yield flat[cut.start : cut.start + cut.count]

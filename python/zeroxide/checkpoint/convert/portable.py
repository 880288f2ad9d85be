"""A checkpoint outside of any engine: what it holds by name, with values that are read when they are asked for.

It is what converting goes through: any reader makes one, any writer takes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.contents import WEIGHTS
from zeroxide.checkpoint.format.json_codec import decode
from zeroxide.checkpoint.format.manifest import read_manifest
from zeroxide.checkpoint.format.stream import SAVED
from zeroxide.checkpoint.live_state import Staging
from zeroxide.checkpoint.load.source import Sources
from zeroxide.device.placement import HOST
from zeroxide.precision.bits import bytes_of, tensor_of
from zeroxide.zero.names import plain_name

__all__ = ["Portable", "PortableParameter", "Segments", "read_own"]


class Segments(Protocol):
    """The elements of one part of one parameter, or of a buffer."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Flat tensors of one dtype that make up all elements in order; each may be valid until the next is taken."""


@dataclass(frozen=True)
class PortableParameter:
    """One parameter, as in a manifest."""

    names: list[str]
    shape: list[int]
    trainable: bool
    updates: int
    group: int | None
    opaque: bool = False

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Portable:
    """A whole checkpoint. `segments` has the parts of parameters by (name, part); frozen ones have weights only."""

    parameters: list[PortableParameter]
    segments: Mapping[tuple[str, str], Segments]
    buffers: Mapping[str, torch.Tensor]
    precision: str
    groups: Sequence[Mapping[str, Any]]
    scheduler: tuple[str, Any] | None
    counters: Mapping[str, int]
    client_state: Mapping[str, Any]
    dtypes: Mapping[tuple[str, str], torch.dtype] = field(default_factory=dict)
    """dtypes of segments that cannot be told without reading them."""
    notes: Sequence[str] = ()
    """What was left out, in lines for people."""

    def dtype(self, name: str, part: str) -> torch.dtype:
        """The dtype in which a part is stored."""
        found = self.dtypes.get((name, part))
        return next(iter(self.segments[name, part])).dtype if found is None else found


class _Chunks:
    """The elements of a tensor of our own checkpoint."""

    def __init__(self, sources: Sources, pieces: Sequence[Any], shape: Sequence[int]) -> None:
        self._sources = sources
        self._pieces = pieces
        self._shape = shape

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _, values in self._sources.chunks(self._pieces, 0, prod(self._shape), self._shape):
            yield values


def read_own(directory: Path, *, moments: bool) -> Portable:
    """A checkpoint of zeroxide: manifest and files are verified. Without `moments` only weights and buffers are.

    Raises CheckpointError.
    """
    manifest = read_manifest(directory)
    lists = {
        (plain_name(saved.name), part): saved.part(part)
        for saved in manifest.parameters
        for part in saved.parts()
        if moments or part == WEIGHTS
    }
    needed = [piece for pieces in lists.values() for piece in pieces]
    needed += [piece for saved in manifest.buffers for piece in saved.pieces]
    sources = Sources(directory, manifest.files, needed, Staging(), Team(None))
    shapes = {plain_name(saved.name): saved.shape for saved in manifest.parameters}
    buffers = {}
    for saved in manifest.buffers:
        shape, empty = torch.Size(saved.shape), torch.empty(0, dtype=torch.uint8, device=HOST)
        values = [bytes_of(each).clone() for _, each in sources.chunks(saved.pieces, 0, shape.numel(), shape)]
        kept = tensor_of(torch.cat([empty, *values]), SAVED[saved.pieces[0].dtype], shape)
        buffers[plain_name(saved.name)] = kept
    return Portable(
        parameters=[
            PortableParameter(
                list(dict.fromkeys(map(plain_name, saved.names))),
                saved.shape,
                saved.trainable,
                saved.updates,
                saved.group,
                saved.opaque,
            )
            for saved in manifest.parameters
        ],
        segments={key: _Chunks(sources, pieces, shapes[key[0]]) for key, pieces in lists.items()},
        buffers=buffers,
        precision=manifest.precision,
        groups=[decode(group.hyperparameters) for group in manifest.groups],
        scheduler=None if manifest.scheduler is None else (manifest.scheduler.kind, decode(manifest.scheduler.state)),
        counters=manifest.counters.model_dump(),
        client_state=decode(manifest.client_state),
        dtypes={key: SAVED[pieces[0].dtype] for key, pieces in lists.items()},
    )

"""The manifest: everything of a checkpoint but its tensors, and what each of its files must contain.

It is one JSON object. `digest` is the checksum of all the rest, written with sorted keys and without white space, so
that a changed digit is found and reformatting is not mistaken for damage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from zeroxide.checkpoint.format.stream import SAVED, digest
from zeroxide.checkpoint.load.foreign import foreign_format
from zeroxide.errors import CheckpointError
from zeroxide.params.part import Region

__all__ = [
    "MANIFEST",
    "VERSION",
    "Counters",
    "Group",
    "Manifest",
    "Piece",
    "SavedBuffer",
    "SavedFile",
    "SavedLossScale",
    "SavedParameter",
    "SavedRegion",
    "SavedScheduler",
    "looks_pickled",
    "read_manifest",
]

MANIFEST = "manifest.json"
FORMAT = "zeroxide-checkpoint"
VERSION = 5
"""5 has CRC-64/NVME of its files, where those before have BLAKE2b. 4 has pieces of regions, where ranks had parts of a
tensor. 3 has a parameter's optimizer state by name, and dtypes and opaque weights that 2 had no word for. 2 had the
moments of Adam beside its weights. 1 held the random generators of one process; all else reads as 2."""
MAX_MANIFEST_BYTES = 1 << 30
MOST_SHOWN = 300
"""Characters of an error that come from a file."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state that versions before 3 could hold, each in a key of its own."""


def _known_dtype(name: str) -> str:
    if name not in SAVED:
        raise ValueError(f"unknown dtype {name!r}")
    return name


def _inside(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
    return name


Size = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(_inside)]
DtypeName = Annotated[str, AfterValidator(_known_dtype)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SavedRegion(_Section):
    """Elements of a tensor that one rank had: along `dim` those of `segments`, (start, length), one after the other."""

    dim: Size
    segments: Annotated[list[Annotated[list[Size], Field(min_length=2, max_length=2)]], Field(min_length=1)]

    def within(self, shape: Sequence[int]) -> Region:
        """The region of a tensor of `shape`. Raises ValueError where the tensor has no such."""
        if self.dim >= len(shape):
            raise ValueError(f"a tensor of {len(shape)} dimensions has no dimension {self.dim}")
        return Region(tuple(shape), self.dim, tuple((start, length) for start, length in self.segments))


class Piece(_Section):
    """Elements `start .. start + count` of a tensor, or of a region of it: those of the tensor `key` in `file`."""

    file: FileName
    key: str
    start: Size
    count: Size
    dtype: DtypeName
    region: SavedRegion | None = None
    """Where ranks had parts of the tensor."""


class SavedParameter(_Section):
    """One parameter. A part without pieces was not saved; frozen parameters have no optimizer state."""

    names: Annotated[list[str], Field(min_length=1)]
    shape: list[Size]
    trainable: bool
    updates: Size
    group: Size | None
    weights: list[Piece]
    state: dict[str, list[Piece]]
    """The optimizer's state tensors, by name."""
    opaque: bool = False
    """Frozen, and its elements are not numbers of their dtype but whatever its class makes of them."""

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    def part(self, part: str) -> list[Piece]:
        """The pieces of "weights" or of a state tensor; none where that was not saved."""
        return self.weights if part == "weights" else self.state.get(part, [])

    def parts(self) -> list[str]:
        """The parts that were saved."""
        return [part for part in ("weights", *self.state) if self.part(part)]


class SavedBuffer(_Section):
    """One persistent buffer."""

    name: str
    shape: list[Size]
    pieces: Annotated[list[Piece], Field(min_length=1)]


class SavedFile(_Section):
    """What a file must be: its size in bytes and its checksum in hex, one of the two.

    A checksum finds what a disk or a copy has damaged; neither keeps out somebody who changes a file and the manifest.
    """

    name: FileName
    bytes: Size
    crc64nvme: str | None = None
    blake2b: str | None = None
    """BLAKE2b of 16 bytes, which versions before 5 have."""

    @model_validator(mode="after")
    def _has_one(self) -> SavedFile:
        if (self.crc64nvme is None) == (self.blake2b is None):
            raise ValueError(f"{self.name} has to have one checksum")
        return self


class Counters(_Section):
    """How far training was."""

    global_steps: Size
    global_samples: Size
    micro_steps: Size
    skipped_steps: Size


class SavedLossScale(_Section):
    """A dynamic loss scale and the counts that it depends on; as `LossScaler.state_dict`."""

    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    hysteresis: Annotated[int, Field(ge=1)]
    good_steps: Annotated[int, Field(ge=-1)]


class SavedScheduler(_Section):
    """State of a learning-rate schedule and the class that it is of."""

    kind: str
    state: Any


class Group(_Section):
    """One optimizer group: hyperparameters, encoded as in `plain`."""

    hyperparameters: Any


class Manifest(_Section):
    """A whole manifest. `scheduler.state`, `client_state` and the groups are encoded as in `plain`."""

    format: str = FORMAT
    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    zeroxide: str
    precision: str
    """dtype that the weights were computed with, for information."""
    state_format: str
    """Format that the optimizer state was kept in, for information."""
    counters: Counters
    groups: list[Group]
    scheduler: SavedScheduler | None
    loss_scale: SavedLossScale | None = None
    """Written only where there is one."""
    generators: list[dict[str, Any]]
    """Random generators of every rank that saved; none in a checkpoint that was converted."""
    client_state: Any
    parameters: list[SavedParameter]
    buffers: list[SavedBuffer]
    files: list[SavedFile]

    def text(self) -> str:
        """The manifest as it is written: in the newest version."""
        body = {**self.model_dump(), "version": VERSION}
        if self.loss_scale is None:
            del body["loss_scale"]
        for param in body["parameters"]:
            if not param["opaque"]:
                del param["opaque"]
        for piece in _pieces_in(body):
            if piece["region"] is None:
                del piece["region"]
        for file in body["files"]:
            del file["blake2b" if file["blake2b"] is None else "crc64nvme"]
        return json.dumps({**body, "digest": _digest_of(body)}, indent=1) + "\n"

    def checksum(self) -> str:
        """The digest of what this says, whichever version it was read from."""
        return _digest_of(self.model_dump())

    def check(self) -> None:
        """Raises ValueError where the parts do not fit together."""
        files = {file.name for file in self.files}
        _distinct("file", [file.name for file in self.files])
        _distinct("parameter", [name for param in self.parameters for name in param.names])
        _distinct("buffer", [buffer.name for buffer in self.buffers])
        lists = [
            (f"{part} of {param.name}", param.shape, param.part(part))
            for param in self.parameters
            for part in param.parts()
        ]
        lists += [(buffer.name, buffer.shape, buffer.pieces) for buffer in self.buffers]
        for what, shape, pieces in lists:
            if not files.issuperset(piece.file for piece in pieces) or not _complete(pieces, shape):
                raise ValueError(f"{what} is not complete")


def _complete(pieces: Sequence[Piece], shape: Sequence[int]) -> bool:
    """Whether pieces are all elements of a tensor, each once. Raises ValueError for a region that the tensor lacks."""
    ends: dict[Region | None, int] = {}
    for piece in pieces:
        region = None if piece.region is None else piece.region.within(shape)
        if piece.start != ends.setdefault(region, 0):
            return False
        ends[region] += piece.count
    regions = [region for region in ends if region is not None]
    if len(regions) < len(ends):
        return not regions and ends[None] == prod(shape)
    if len({region.dim for region in regions}) != 1 or any(ends[region] != region.numel for region in regions):
        return False
    place = 0
    for start, length in sorted(segment for region in regions for segment in region.segments if segment[1]):
        if start != place:
            return False
        place += length
    return place == shape[regions[0].dim]


def _pieces_in(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for param in body["parameters"]:
        for pieces in (param["weights"], *param["state"].values()):
            yield from pieces
    for buffer in body["buffers"]:
        yield from buffer["pieces"]


def _distinct(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two {what}s are called {name}")
        seen.add(name)


def _digest_of(body: dict[str, Any]) -> str:
    made = digest()
    made.update(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    return made.hexdigest()


def _from_version_1(body: dict[str, Any]) -> dict[str, Any]:
    found = body.get("generators")
    return {**body, "version": 2, "generators": [found] if isinstance(found, dict) else found}


def _with_named_state(body: dict[str, Any]) -> dict[str, Any]:
    """The manifest with every parameter's state by name, whichever version it is of."""
    parameters = body.get("parameters")
    if not isinstance(parameters, list) or not all(isinstance(each, dict) for each in parameters):
        return body
    named = []
    for each in parameters:
        moments = {name: each[name] for name in _MOMENTS if name in each}
        rest = {key: value for key, value in each.items() if key not in moments}
        state = {name: pieces for name, pieces in moments.items() if pieces}
        named.append({**rest, "state": state} if moments else each)
    return {**body, "parameters": named}


def looks_pickled(start: bytes) -> bool:
    """Whether a file that begins with `start` is a Python pickle or what torch.save wraps one in."""
    return start.startswith(_PICKLE_STARTS)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the checkpoint in `directory`. Raises CheckpointError for anything that is not one."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_not_a_checkpoint(directory), path=directory) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=directory) from None
    if looks_pickled(raw):
        raise CheckpointError(_pickle_line(path), path=directory)
    try:
        if len(raw) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        body = json.loads(raw)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f'"format" is not "{FORMAT}"')
        if "version" not in body:
            raise ValueError('there is no "version"')
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or no manifest: {_printable(error)}; load another checkpoint", path=directory
        ) from None
    version = body.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"{path} has version {_printable(version)}, this zeroxide reads up to {VERSION}: "
            f"load it with zeroxide {_printable(body.get('zeroxide'))} or later",
            path=directory,
        )
    try:
        expected = body.pop("digest", None)
        if expected != _digest_of(body):
            raise ValueError(f"its checksum should be {expected} and is {_digest_of(body)}")
        if version == 1:
            body = _from_version_1(body)
        body = _with_named_state(body)
        manifest = Manifest.model_validate(body)
        manifest.check()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        line = _printable(f"{place}: {first['msg']}")
        raise CheckpointError(f"{path} is not well-formed at {line}", path=directory) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {_printable(error)}; load another checkpoint", path=directory
        ) from None
    return manifest


def _printable(said: object) -> str:
    """What is shown of what a file says: one line that any terminal takes, and no more than the beginning of it."""
    return " ".join(str(said).split()).encode(errors="backslashreplace").decode()[:MOST_SHOWN]


def _not_a_checkpoint(directory: Path) -> str:
    if directory.is_file():
        with directory.open("rb") as file:
            if looks_pickled(file.read(8)):
                return _pickle_line(directory)
        return f"{directory} is a file: a checkpoint is a directory with a {MANIFEST}"
    if not directory.exists():
        return f"no checkpoint at {directory}"
    if (foreign := foreign_format(directory)) is not None:
        return f"{directory} {foreign}"
    for pattern in ("*.pt", "*.pth", "*.bin", "*.pkl"):
        for pickled in sorted(directory.glob(pattern)):
            return f"{directory} holds {pickled.name} and no {MANIFEST}: {_pickle_line(pickled)}"
    return f"{directory} is not a zeroxide checkpoint: it has no {MANIFEST}"


def _pickle_line(path: Path) -> str:
    return f"{path.name} is a Python pickle, which can run code when it is read: zeroxide does not read pickles"

"""What ranks tell rank 0 of the files that they have written, and the manifest that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zeroxide.checkpoint.contents import WEIGHTS, ParamRecord
from zeroxide.checkpoint.format.cutting import Cut
from zeroxide.checkpoint.format.manifest import (
    Manifest,
    Piece,
    SavedBuffer,
    SavedFile,
    SavedParameter,
    SavedRegion,
)
from zeroxide.checkpoint.format.stream import saved_name
from zeroxide.checkpoint.save.description import BUFFERS, Description
from zeroxide.errors import CheckpointError
from zeroxide.params.part import Region

__all__ = ["manifest_text", "report"]


def report(description: Description, written: Sequence[SavedFile]) -> dict[str, Any]:
    """What rank 0 needs to know of the files of this rank, as JSON."""
    pieces = [
        [name.partition("-")[0], cut.tensor.name, _piece(name, cut, description).model_dump()]
        for name, cuts in description.files
        for cut in cuts
    ]
    return {
        "files": [each.model_dump() for each in written],
        "pieces": pieces,
        "generators": description.generators,
        # Where ranks have parts of the model, rank 0 does not know the parameters of the others.
        "parameters": list(_parameters(description)) if description.in_parts else [],
        "buffers": _buffers(description) if description.in_parts else [],
    }


def manifest_text(description: Description, reports: Sequence[dict[str, Any]]) -> str:
    """The manifest from the reports of all ranks, in rank order, as it is written. Only on rank 0.

    Raises CheckpointError where ranks say different things of one parameter or buffer.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for report in reports:
        for family, name, piece in report["pieces"]:
            pieces.setdefault((family, name), []).append(Piece(**piece))
    for found in pieces.values():
        found.sort(key=lambda piece: ([] if piece.region is None else piece.region.segments, piece.start))
    parameters = _merged([list(_parameters(description)), *(report["parameters"] for report in reports)])
    buffers = _merged([_buffers(description), *(report["buffers"] for report in reports)])
    manifest = Manifest(
        **description.frame,
        generators=[report["generators"] for report in reports],
        parameters=[
            SavedParameter(
                **{key: value for key, value in said.items() if key not in ("name", "states")},
                weights=pieces.get((WEIGHTS, name), []),
                state={state: pieces[state, name] for state in said["states"] if (state, name) in pieces},
            )
            for name, said in parameters.items()
        ],
        buffers=[
            SavedBuffer(name=name, shape=said["shape"], pieces=pieces[BUFFERS, name]) for name, said in buffers.items()
        ],
        files=[SavedFile(**file) for report in reports for file in report["files"]],
    )
    # A hole here would be a fault of ours, and must not become a checkpoint.
    manifest.check()
    return manifest.text()


def _parameters(description: Description) -> Iterator[dict[str, Any]]:
    for held, updates in zip(description.records, description.updates, strict=True):
        yield {
            "name": held.name,
            "names": list(held.names),
            "shape": list(held.full_shape),
            "trainable": held.trainable,
            "opaque": held.opaque,
            "updates": updates,
            "group": held.group,
            "states": list(held.states),
        }


def _buffers(description: Description) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(buffer.shape)} for name, buffer in description.buffers.items()]


def _merged(said: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What is said of each name, in the order in which names are first said. Names of one parameter are all of them."""
    found: dict[str, dict[str, Any]] = {}
    for each in said:
        for one in each:
            first = found.setdefault(one["name"], dict(one))
            for key, value in one.items():
                if key == "names":
                    first[key] = list(dict.fromkeys([*first[key], *value]))
                elif first[key] != value:
                    raise CheckpointError(
                        f"ranks have different parts of {one['name']}: {key} is {first[key]!r} on one and {value!r} on "
                        "another"
                    )
    return found


def _piece(file: str, cut: Cut, description: Description) -> Piece:
    held: ParamRecord | None = None if file.startswith(f"{BUFFERS}-") else description.held(cut)[0]
    region = None if held is None or held.region is None else _saved(held.region)
    return Piece(
        file=file,
        key=cut.entry.key,
        start=cut.start,
        count=cut.count,
        dtype=saved_name(cut.tensor.dtype),
        region=region,
    )


def _saved(region: Region) -> SavedRegion:
    return SavedRegion(dim=region.dim, segments=[list(segment) for segment in region.segments])

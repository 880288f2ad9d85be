"""What ranks tell rank 0 of the files that they have written, and the manifest that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroxide.checkpoint.contents import WEIGHTS
from zeroxide.checkpoint.format.cutting import Cut
from zeroxide.checkpoint.format.manifest import Manifest, Piece, SavedBuffer, SavedFile, SavedParameter
from zeroxide.checkpoint.format.stream import saved_name
from zeroxide.checkpoint.save.description import BUFFERS, Description

__all__ = ["manifest_text", "report"]


def report(description: Description, written: Sequence[SavedFile]) -> dict[str, Any]:
    """What rank 0 needs to know of the files of this rank, as JSON."""
    pieces = [
        [name.partition("-")[0], cut.tensor.name, _piece(name, cut).model_dump()]
        for name, cuts in description.files
        for cut in cuts
    ]
    told: dict[str, Any] = {
        "files": [each.model_dump() for each in written],
        "pieces": pieces,
        "generators": description.generators,
    }
    if description.leads_part:
        told["parameters"] = description.parameters()
        told["buffers"] = {name: list(buffer.shape) for name, buffer in description.buffers.items()}
    return told


def manifest_text(description: Description, reports: Sequence[dict[str, Any]]) -> str:
    """The whole manifest from the reports of all ranks, in rank order, as it is written. Only on rank 0."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    buffers: dict[str, list[int]] = {}
    for report in reports:
        # Parts of the model may have a buffer alike: the first one's is saved.
        repeated = buffers.keys() & report.get("buffers", {}).keys()
        for family, name, piece in report["pieces"]:
            if not (family == BUFFERS and name in repeated):
                pieces.setdefault((family, name), []).append(Piece(**piece))
        buffers = {**report.get("buffers", {}), **buffers}
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    manifest = Manifest(
        **description.frame,
        generators=[report["generators"] for report in reports],
        parameters=[_parameter(each, pieces) for report in reports for each in report.get("parameters", ())],
        buffers=[SavedBuffer(name=name, shape=shape, pieces=pieces[BUFFERS, name]) for name, shape in buffers.items()],
        files=[SavedFile(**file) for report in reports for file in report["files"]],
    )
    # A hole here would be a fault of ours, and must not become a checkpoint.
    manifest.check()
    return manifest.text()


def _parameter(told: dict[str, Any], pieces: dict[tuple[str, str], list[Piece]]) -> SavedParameter:
    name, states = told["names"][0], told["states"]
    return SavedParameter(
        **{key: value for key, value in told.items() if key != "states"},
        weights=pieces.get((WEIGHTS, name), []),
        state={state: pieces[state, name] for state in states if (state, name) in pieces},
    )


def _piece(file: str, cut: Cut) -> Piece:
    entry = cut.entry
    return Piece(file=file, key=entry.key, start=cut.start, count=cut.count, dtype=saved_name(cut.tensor.dtype))

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
    return {
        "files": [each.model_dump() for each in written],
        "pieces": pieces,
        "generators": description.generators,
        "parameters": description.parameters,
    }


def manifest_text(description: Description, reports: Sequence[dict[str, Any]]) -> str:
    """The whole manifest from the reports of all ranks, in rank order, as it is written. Only on rank 0."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for report in reports:
        for family, name, piece in report["pieces"]:
            pieces.setdefault((family, name), []).append(Piece(**piece))
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    known = {each["names"][0]: each for report in reversed(reports) for each in report["parameters"]}
    # Rank 0's in their order, then what only others have.
    order = dict.fromkeys(each["names"][0] for report in reports for each in report["parameters"])
    manifest = Manifest(
        **description.frame,
        generators=[report["generators"] for report in reports],
        parameters=[
            SavedParameter(
                **{key: value for key, value in known[name].items() if key != "states"},
                weights=pieces.get((WEIGHTS, name), []),
                state={state: pieces[state, name] for state in known[name]["states"] if (state, name) in pieces},
            )
            for name in order
        ],
        buffers=[
            SavedBuffer(name=name, shape=list(buffer.shape), pieces=pieces[BUFFERS, name])
            for name, buffer in description.buffers.items()
        ],
        files=[SavedFile(**file) for report in reports for file in report["files"]],
    )
    # A hole here would be a fault of ours, and must not become a checkpoint.
    manifest.check()
    return manifest.text()


def _piece(file: str, cut: Cut) -> Piece:
    entry = cut.entry
    return Piece(file=file, key=entry.key, start=cut.start, count=cut.count, dtype=saved_name(cut.tensor.dtype))

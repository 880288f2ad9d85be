"""What ranks tell rank 0 of the files that they have written, and the manifest that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeroxide.checkpoint.contents import WEIGHTS
from zeroxide.checkpoint.format.cutting import Cut
from zeroxide.checkpoint.format.manifest import Manifest, Piece, SavedBuffer, SavedCut, SavedFile, SavedParameter
from zeroxide.checkpoint.format.stream import saved_name
from zeroxide.checkpoint.save.description import BUFFERS, Description

__all__ = ["manifest_text", "report"]


def report(description: Description, written: Sequence[SavedFile]) -> dict[str, Any]:
    """What rank 0 needs to know of the files of this rank, as JSON."""
    pieces = [
        [name.partition("-")[0], cut.tensor.name, _piece(description, name, cut).model_dump()]
        for name, cuts in description.files
        for cut in cuts
    ]
    return {"files": [each.model_dump() for each in written], "pieces": pieces, "generators": description.generators}


def manifest_text(description: Description, reports: Sequence[dict[str, Any]]) -> str:
    """The whole manifest from the reports of all ranks, in rank order, as it is written. Only on rank 0."""
    pieces: dict[tuple[str, str], list[Piece]] = {}
    for report in reports:
        for family, name, piece in report["pieces"]:
            pieces.setdefault((family, name), []).append(Piece(**piece))
    for found in pieces.values():
        found.sort(key=_place)
    manifest = Manifest(
        **description.frame,
        generators=[report["generators"] for report in reports],
        parameters=[
            SavedParameter(
                names=list(held.names),
                shape=list(held.shape),
                trainable=held.trainable,
                opaque=held.opaque,
                updates=updates,
                group=held.group,
                weights=pieces.get((WEIGHTS, held.name), []),
                state={name: pieces[name, held.name] for name in held.states if (name, held.name) in pieces},
            )
            for held, updates in zip(description.records, description.updates, strict=True)
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


def _place(piece: Piece) -> tuple[list[list[int]], int]:
    return [] if piece.cut is None else piece.cut.ranges, piece.start


def _piece(description: Description, file: str, cut: Cut) -> Piece:
    entry, held = cut.entry, description.by_name.get(cut.tensor.name)
    shard = None if held is None or file.startswith(BUFFERS) else held.shard
    part = None
    if shard is not None:
        part = SavedCut(shape=list(shard.shape), dim=shard.dim, ranges=[list(each) for each in shard.own])
    return Piece(
        file=file, key=entry.key, start=cut.start, count=cut.count, dtype=saved_name(cut.tensor.dtype), cut=part
    )

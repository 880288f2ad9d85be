"""Initial weights that come in pieces: the values of those that come whole, and never a unit in fp32 beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.engine.engine import Engine
from zeroxide.errors import ModelError


class Model(nn.Module):
    """Blocks of which one parameter is frozen, and a buffer that has to be made."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.blocks[1].weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(40, track_running_stats=False)
        self.register_buffer("scale", torch.ones(4))
        self.blocks[2].register_buffer("scale", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def values_of(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


class Whole:
    """Fills tensors of a whole unit at once, as the protocol has it."""

    def __init__(self) -> None:
        self.at_once: list[int] = []

    def fill(self, tensors: dict[str, torch.Tensor], modules: dict[str, nn.Module]) -> None:
        self.at_once.append(sum(tensor.numel() for tensor in tensors.values()))
        for name, tensor in tensors.items():
            tensor.copy_(values_of(name, tensor.shape))
        for module in modules.values():
            for buffer in module.buffers(recurse=False):
                buffer.fill_(2.0)


class Pieces(Whole):
    """Gives them in pieces of 7 elements, in memory that is used again for the next."""

    cut = 7
    lost = 0
    skipped = 0

    def pieces(self, name: str, shape: torch.Size) -> Iterator[tuple[int, torch.Tensor]]:
        flat = values_of(name, shape).flatten()
        room = torch.empty(self.cut)
        for start in range(self.skipped, flat.numel() - self.lost, self.cut):
            piece = flat[start : start + self.cut]
            room[: piece.numel()] = piece
            yield start, room[: piece.numel()]


def engine_from(source: Any, folder: Path | None) -> Engine:
    with torch.device("meta"):
        model = Model()
    model.norm = nn.Identity()
    engine, *_ = zeroxide.initialize(
        model=model,
        weights=source,
        lr=1e-3,
        dtype="bf16",
        offload="none" if folder is None else f"nvme:{folder}",
        config={"zeroxide": {"tile_bytes": 4096}},
    )
    return engine


@pytest.mark.parametrize("on_disk", [True, False])
def test_weights_in_pieces_are_those_that_come_whole(tmp_path: Path, on_disk: bool) -> None:
    """Catches: a piece put at another's place, a frozen parameter or a buffer that is left out, a unit that is asked
    for whole."""
    found = []
    for source in (Whole(), Pieces()):
        engine = engine_from(source, tmp_path if on_disk else None)
        with zeroxide.zero.GatheredParameters(engine.module):
            found.append({name: param.float().clone() for name, param in engine.module.named_parameters()})
        found[-1] |= {name: buffer.float().clone() for name, buffer in engine.module.named_buffers()}
        found[-1]["exact"] = zeroxide.safe_get_full_fp32_param(engine.module.blocks[0].weight)
        engine.destroy()
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert torch.equal(found[0]["exact"], values_of("blocks.0.weight", torch.Size([40, 40])))
    # Beside the frozen parameter only the buffer is asked for as before.
    assert source.at_once == [1600, 0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"lost": 7}, "pieces of blocks.0.weight: expected 1600 elements, got"),
        ({"skipped": 1}, "pieces of blocks.0.weight: expected one from element 0 on, got one from 1 on"),
    ],
)
def test_pieces_that_do_not_make_up_the_parameter_are_refused(
    tmp_path: Path, change: dict[str, int], line: str
) -> None:
    """Catches: elements that nobody gave, which would be zero."""
    source = Pieces()
    vars(source).update(change)
    with pytest.raises(ModelError, match=line):
        engine_from(source, tmp_path)

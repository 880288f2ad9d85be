"""`update_in_backward: "adaptive"`: whether backward updates, and speculates, is decided by bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_speculated_updates import Spoils, Stack, assert_same, engine_with, loss_of, state_of, traffic

from zeroxide.engine.engine import Engine

DISK = {"gradients": "disk"}
UNTIL_IT_PAYS = 37
"""Steps that do not clip, after which it pays: three blocks' gradients are not read, one block's are written beside
those of the other three, 155,648 bytes less in pages; all is read and written again where a step clips, 4,694,016
bytes. One in 30.2 may clip, and 1 / (64 (1 - (63/64)^k) + 2) is below that from k = 37 on."""


def trained(engine: Engine, clips: dict[int, float], steps: int) -> dict[str, Any]:
    """Losses, norms, weights and moments of a run whose clipping changes at some steps."""
    generator = torch.Generator().manual_seed(5)
    losses, norms = [], []
    for step in range(steps):
        if step in clips:
            engine.set_gradient_clipping(clips[step])
        loss = loss_of(engine, torch.randint(0, 256, (2, 7), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    return {"losses": losses, "norms": norms, **state_of(engine)}


def test_it_speculates_while_few_steps_clip_with_the_same_bits(tmp_path: Path) -> None:
    """It begins as soon as it pays, makes steps that clip again, and stops when most do."""
    clips = {UNTIL_IT_PAYS + 2: 1e-3}
    steps = UNTIL_IT_PAYS + 10
    waits = engine_with(tmp_path, early=False, clip=1e9, own=DISK)
    expected = trained(waits, clips, steps)
    waits.destroy()
    engine = engine_with(tmp_path, early="adaptive", clip=1e9, own=DISK)
    assert engine.parts.plan.early.chooses
    found = trained(engine, clips, steps)
    redone = engine.parts.updater.redone
    engine.destroy()
    assert_same(expected, found)
    # One is expected in 39; the first that clips makes it two.
    assert redone == 1


def test_its_bytes_are_those_of_waiting_before_it_pays_and_of_speculating_after(tmp_path: Path) -> None:
    usual = engine_with(tmp_path, early=False, clip=1e9, own=DISK)
    chooses = engine_with(tmp_path, early="adaptive", clip=1e9, own=DISK)
    always = engine_with(tmp_path, early=True, clip=1e9, own=DISK)
    assert abs(traffic(chooses)[0] - traffic(usual)[0]) < traffic(usual)[0] // 20
    traffic(chooses, steps=UNTIL_IT_PAYS)
    read = traffic(chooses)[0]
    less = always.parts.plan.numbers.speculation_traffic[0]
    assert read < traffic(usual)[0] - less // 2
    assert chooses.parts.plan.disk_bytes == always.parts.plan.disk_bytes > usual.parts.plan.disk_bytes
    assert any("while few of the last steps did" in line for line in chooses.plan().describe())
    for engine in (usual, chooses, always):
        engine.destroy()


def test_overflows_count_as_steps_that_clip(tmp_path: Path) -> None:
    """Catches: a left-out step that is not noted."""
    asked: dict[str, Any] = {
        "own": DISK,
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
        "model": lambda: Stack(Spoils()),
    }
    engine = engine_with(tmp_path, early="adaptive", clip=1e9, **asked)
    trained(engine, {}, 2)
    share = engine.parts.updater.early._clips
    engine.destroy()
    # One of two: (63/64 + 1) / (63/64 + 1 + 2) or (1 + 1) of it, whichever came first.
    assert share.expected > 0.49


def test_without_clipping_it_is_what_true_is(tmp_path: Path) -> None:
    one = engine_with(tmp_path, early=True, clip=0, model=UntiedStack)
    other = engine_with(tmp_path, early="adaptive", clip=0, model=UntiedStack)
    assert one.parts.plan.buckets == other.parts.plan.buckets
    assert other.parts.plan.early.updates
    assert not other.parts.plan.early.speculates
    assert_same(trained(one, {}, 4), trained(other, {}, 4))
    one.destroy()
    other.destroy()


class UntiedStack(Stack):
    """Without a weight that is held through backward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return torch.nn.functional.pad(hidden, (0, 256 - hidden.shape[-1]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"zero_optimization": {"stage": 3}}, 'offload_param.device to "nvme", got "none"'),
        ({"own": {"durable_every": 1}}, "durable_every 1"),
        ({"own": {"gradients": "host"}}, "gradients wait in host memory"),
        ({"own": {"accumulation_order": "layers"}}, 'accumulation_order "layers"'),
        ({"own": {"row_bytes": "16KiB"}}, "row_bytes cuts matrices"),
    ],
    ids=["memory", "durable", "gradients", "layers", "rows"],
)
def test_where_it_cannot_updates_wait_and_the_plan_says_why(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    """Catches: "adaptive" refused, or taken without a word for false."""
    engine = engine_with(tmp_path / "one", early="adaptive", clip=1.0, **changes)
    usual = engine_with(tmp_path / "other", early=False, clip=1.0, **changes)
    assert engine.parts.plan.disk_bytes == usual.parts.plan.disk_bytes
    assert not engine.parts.plan.early.updates
    assert any(why in line for line in engine.plan().describe()), engine.plan().describe()
    assert not any("update_in_backward" in line for line in usual.plan().describe())
    engine.destroy()
    usual.destroy()

"""Updates inside of backward that may be taken back: the bits of a step that waits for the norm, clipped or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeroxide
from zeroxide.engine.engine import Engine
from zeroxide.errors import CheckpointError, ConfigError, ModelError

WIDTH = 96
STEPS = 5


class Stack(nn.Module):
    """A tied embedding, and blocks of which the last one may be followed by a `spoil` of gradients."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 200), nn.Linear(200, WIDTH)) for _ in range(4))
        self.blocks[1][0].bias.requires_grad_(False)
        self.spoil = spoil

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for number, block in enumerate(self.blocks):
            if number == 1 and self.spoil is not None:
                hidden.register_hook(self.spoil)
            hidden = hidden + block(hidden).tanh()
        return hidden @ self.table.weight.t()


def engine_with(folder: Path, *, early: bool | str, clip: float, **changes: Any) -> Engine:
    torch.manual_seed(0)
    own = changes.pop("own", {})
    model = changes.pop("model", Stack)
    disk = {"device": "nvme", "nvme_path": str(folder)}
    engine, *_ = zeroxide.initialize(
        model=model(),
        config={
            "bf16": {"enabled": "fp16" not in changes},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "gradient_clipping": clip,
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "offload_param": disk, "offload_optimizer": disk},
            "zeroxide": {"update_in_backward": early, "tile_bytes": 4096, "threads": 2, **own},
            "steps_per_print": None,
            **changes,
        },
    )
    return engine


def loss_of(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), (tokens * 7 + 3).flatten() % 256)


def state_of(engine: Engine) -> dict[str, Any]:
    state = engine.optimizer.state_dict()["state"]
    values = {key: {name: state[key][name] for name in state[key]} for key in state}
    return {"state": values, "weights": engine.module_state_dict(), "skipped": engine.skipped_steps}


def trained(engine: Engine, steps: int = STEPS) -> dict[str, Any]:
    """Losses and norms of steps, and all weights and moments after them."""
    generator = torch.Generator().manual_seed(5)
    losses, norms = [], []
    for _ in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, torch.randint(0, 256, (2, 7), generator=generator))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    return {"losses": losses, "norms": norms, **state_of(engine)}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def waiting(folder: Path, clip: float, **asked: Any) -> dict[str, Any]:
    engine = engine_with(folder, early=False, clip=clip, **asked)
    found = trained(engine)
    engine.destroy()
    return found


def between(folder: Path, **asked: Any) -> float:
    """A largest norm that some steps of a run exceed, whatever it clips, and others do not."""
    norms = sorted(waiting(folder, 1e9, **asked)["norms"])
    return (norms[1] + norms[2]) / 2


def both(folder: Path, clip: float, **asked: Any) -> int:
    """Compares the two ways and returns how many steps were made again."""
    expected = waiting(folder, clip, **asked)
    engine = engine_with(folder, early=True, clip=clip, **asked)
    found = trained(engine)
    redone = engine.parts.updater.redone
    assert redone == sum(clip < norm + 1e-6 for norm in expected["norms"])
    engine.destroy()
    assert_same(expected, found)
    return redone


@pytest.mark.parametrize("home", ["host", "disk"])
def test_steps_that_clip_are_made_again_and_the_others_are_not(tmp_path: Path, home: str) -> None:
    own = {"gradients": home}
    assert 0 < both(tmp_path, between(tmp_path, own=own), own=own) < STEPS


@pytest.mark.parametrize(("clip", "redone"), [(1e-3, STEPS), (1e9, 0)])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_all_or_none_clip(tmp_path: Path, clip: float, redone: int, home: str) -> None:
    assert both(tmp_path, clip, own={"gradients": home}) == redone


@pytest.mark.parametrize("name", ["split-bf16", "compact"])
def test_formats_that_round_draw_the_same_bits_again(tmp_path: Path, name: str) -> None:
    own = {"format": name, "gradients": "disk"}
    assert 0 < both(tmp_path, between(tmp_path, own=own), own=own) < STEPS


def test_micro_batches_add_up_before_the_last_updates(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"own": {"gradients": "disk"}, "gradient_accumulation_steps": 2}
    assert 0 < both(tmp_path, between(tmp_path, **asked), **asked) < STEPS


def test_units_at_home_in_host_memory_wait_for_the_step(tmp_path: Path) -> None:
    own = {"state_in_memory": 300_000}
    assert 0 < both(tmp_path, between(tmp_path, own=own), own=own) < STEPS


class Spoils:
    """Makes gradients of a backward infinite, or raises there."""

    def __init__(self) -> None:
        self.calls, self.at, self.raises = 0, 1, False

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls - 1 != self.at:
            return grad
        if self.raises:
            raise ValueError("a hook of the user's")
        return grad * float("inf")


@pytest.mark.parametrize("home", ["host", "disk"])
def test_an_overflow_late_in_backward_leaves_the_step_out(tmp_path: Path, home: str) -> None:
    """Three blocks are updated when the gradient of the first one overflows."""
    asked: dict[str, Any] = {
        "own": {"gradients": home},
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
        "model": lambda: Stack(Spoils()),
    }
    found = []
    for early in (False, True):
        engine = engine_with(tmp_path, early=early, clip=1e9, **asked)
        found.append(trained(engine))
        assert engine.skipped_steps == 1
        assert engine.parts.updater.redone == 0
        engine.destroy()
    assert_same({**found[0], "norms": None}, {**found[1], "norms": None})


def test_a_backward_that_fails_is_taken_back(tmp_path: Path) -> None:
    spoils = Spoils()
    spoils.at, spoils.raises = 0, True
    engine = engine_with(tmp_path, early=True, clip=1e9, model=lambda: Stack(spoils), own={"gradients": "disk"})
    before = state_of(engine)
    with pytest.raises(ValueError, match="a hook of the user's"):
        engine.backward(loss_of(engine, torch.arange(14).reshape(2, 7)))
    engine.zero_grad()
    assert_same(before, state_of(engine))
    found = trained(engine)
    engine.destroy()
    assert_same(waiting(tmp_path, 1e9), found)


def test_what_lies_between_backward_and_step_is_refused_and_harmless(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, early=True, clip=1e-3)
    expected = waiting(tmp_path, 1e-3)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 256, (2, 7), generator=generator)
    engine.backward(loss_of(engine, tokens))
    for act in (
        lambda: engine.backward(torch.zeros((), requires_grad=True)),
        lambda: engine(tokens),
        engine.zero_grad,
        engine.module_state_dict,
    ):
        with pytest.raises(ModelError, match="update_in_backward"):
            act()
    with pytest.raises(CheckpointError, match="gradients that no step has used"):
        engine.save_checkpoint(str(tmp_path / "saved"))
    engine.step()
    assert engine.get_global_grad_norm() == expected["norms"][0]
    assert engine.parts.updater.redone == 1
    for _ in range(STEPS - 1):
        engine.backward(loss_of(engine, torch.randint(0, 256, (2, 7), generator=generator)))
        engine.step()
    assert_same(expected["state"], state_of(engine)["state"])
    engine.backward(loss_of(engine, tokens))
    engine.destroy()


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_no_checkpoint_is_loaded_inside_a_step(tmp_path: Path, clip: float) -> None:
    """Catches: a load that is refused when some of it has changed, or that says so where nothing has."""
    engine = engine_with(tmp_path, early=True, clip=clip, own={"gradients": "disk"})
    generator = torch.Generator().manual_seed(5)

    def backward() -> None:
        engine.backward(loss_of(engine, torch.randint(0, 256, (2, 7), generator=generator)))

    for number in range(STEPS):
        backward()
        if number == 2:
            with pytest.raises(ModelError, match=r"load_checkpoint: backward has begun to update.*engine\.step\(\)"):
                engine.load_checkpoint(str(tmp_path / "saved"))
        engine.step()
        if number == 0:
            engine.save_checkpoint(str(tmp_path / "saved"))
    assert_same(waiting(tmp_path, clip)["state"], state_of(engine)["state"])
    engine.load_checkpoint(str(tmp_path / "saved"))
    generator.manual_seed(5)
    torch.randint(0, 256, (2, 7), generator=generator)
    for _ in range(STEPS - 1):
        backward()
        engine.step()
    assert_same(waiting(tmp_path, clip)["state"], state_of(engine)["state"])
    engine.destroy()


def test_the_plan_counts_a_second_place_for_all_but_gradients(tmp_path: Path) -> None:
    own = {"gradients": "disk"}
    usual = engine_with(tmp_path, early=False, clip=1.0, own=own)
    speculating = engine_with(tmp_path, early=True, clip=1.0, own=own)
    one, two = usual.parts.plan, speculating.parts.plan
    gradients = one.numbers.spilled_bytes
    assert gradients > 0
    assert two.disk_bytes - gradients == 2 * (one.disk_bytes - gradients)
    held = sum(file.stat().st_size for file in tmp_path.glob("zeroxide-*/blocks.bin"))
    assert held == pytest.approx(one.disk_bytes + two.disk_bytes, rel=0.02)
    usual.destroy()
    speculating.destroy()


def traffic(engine: Engine, steps: int = 3) -> tuple[int, int]:
    """Bytes read and written by the last of so many steps."""
    batch = torch.arange(14).reshape(2, 7)
    before, after = {}, {}
    for _ in range(steps):
        engine.finish_step()
        before = engine.io()
        engine.backward(loss_of(engine, batch))
        engine.step()
        engine.finish_step()
        after = engine.io()
    return after["read_bytes"] - before["read_bytes"], after["write_bytes"] - before["write_bytes"]


def test_a_step_that_does_not_clip_reads_no_gradients(tmp_path: Path) -> None:
    own = {"gradients": "disk"}
    waits = engine_with(tmp_path, early=False, clip=1e9, own=own)
    speculates = engine_with(tmp_path, early=True, clip=1e9, own=own)
    (read, written), (less, more) = traffic(speculates), speculates.parts.plan.numbers.speculation_traffic
    usual = traffic(waits)
    assert less > 0
    # Gradients of units that are still being updated when the step comes, of two that have room, need not leave.
    room = speculates.parts.plan.buckets["gradients"]
    assert usual[1] + more - room <= written <= usual[1] + more
    # Which frames backward finds taken differs: weights of a unit may be read once more, or less.
    largest = 2 * max(unit.numel for unit in waits.parts.plan.units)
    assert abs(usual[0] - less - read) <= 2 * largest
    clipped = engine_with(tmp_path, early=True, clip=1e-9, own=own)
    assert sum(traffic(clipped)) > sum(usual)
    assert clipped.parts.updater.redone == 3
    assert any("before it is known whether the step clips" in line for line in clipped.plan().describe())
    for engine in (waits, speculates, clipped):
        engine.destroy()


@pytest.mark.parametrize("early", [False, True])
def test_the_log_of_steps_counts_those_made_again(
    tmp_path: Path, early: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "steps.jsonl"
    engine = engine_with(tmp_path, early=early, clip=1e-3, own={"log": str(log)}, steps_per_print=1)
    trained(engine, steps=2)
    engine.destroy()
    counted = [json.loads(line).get("redone_steps") for line in log.read_text().splitlines()]
    assert counted == ([1, 2] if early else [None, None])
    assert ("redone 2" in capsys.readouterr().out) == early


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"zero_optimization": {"stage": 3}}, 'offload_param.device to "nvme", got "none"'),
        ({"own": {"durable_every": 1}}, "durable_every 1"),
    ],
)
def test_what_has_no_second_place_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        engine_with(tmp_path, early=True, clip=1.0, **changes)
    assert caught.value.path == "zeroxide.update_in_backward"

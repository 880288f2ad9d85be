"""Updates inside of backward: the bits of a step that begins after it, in less memory, and what they rule out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from zeroxide.config import load
from zeroxide.distributed import Ranks
from zeroxide.engine.engine import Engine
from zeroxide.errors import ConfigError, ModelError, StorageError
from zeroxide.plan.home import Home
from zeroxide.plan.update_in_backward import plan_early_updates

WIDTH = 96
BLOCKS = 4


class Stack(nn.Module):
    """An embedding and a head that are one weight, and blocks between them, one of which has a frozen bias."""

    def __init__(self, *, repeats: bool = False, recomputes: bool | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 200), nn.Linear(200, WIDTH)) for _ in range(BLOCKS))
        self.blocks[1][0].bias.requires_grad_(False)
        self.repeats = repeats
        self.recomputes = recomputes
        """Whether recomputation is reentrant; None for none."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for block in (*self.blocks, self.blocks[0]) if self.repeats else self.blocks:
            if self.recomputes is not None:
                hidden = hidden + checkpoint(block, hidden, use_reentrant=self.recomputes).tanh()
            else:
                hidden = hidden + block(hidden).tanh()
        return hidden @ self.table.weight.t()


class Between(torch.autograd.Function):
    """What backward passes between two blocks: `act` makes the gradient another."""

    act: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return Between.act(grad)


class Watched(Stack):
    """With that after `at` blocks, counted from the input."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for number, block in enumerate(self.blocks):
            hidden = Between.apply(hidden) if number == self.at else hidden
            hidden = hidden + block(hidden).tanh()
        hidden = Between.apply(hidden) if self.at == BLOCKS else hidden
        return hidden @ self.table.weight.t()


def raises(grad: torch.Tensor) -> torch.Tensor:
    raise ValueError("a hook of the user's")


def engine_with(
    folder: Path, *, early: bool, state: str = "nvme", weights: str = "nvme", dtype: str = "bf16", **changes: Any
) -> Engine:
    torch.manual_seed(0)
    model = changes.pop("model", Stack)
    own = changes.pop("own", {})
    homes = {"none": {"device": "none"}, "cpu": {"device": "cpu"}, "nvme": {"device": "nvme", "nvme_path": str(folder)}}
    engine, *_ = zeroxide.initialize(
        model=model(),
        config={
            "bf16": {"enabled": dtype == "bf16"},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "gradient_clipping": 0,
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "offload_param": homes[weights], "offload_optimizer": homes[state]},
            "zeroxide": {"update_in_backward": early, "tile_bytes": 4096, "threads": 2, **own},
            "steps_per_print": None,
            **changes,
        },
    )
    return engine


def batches(seed: int = 5) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(0, 256, (2, 7), generator=generator)


def loss_of(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())


def trained(engine: Engine, steps: int = 3) -> dict[str, Any]:
    """Losses and norms of steps, and all weights and moments after them."""
    batch, found = batches(), {"losses": [], "norms": []}
    for number in range(steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        for _ in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, batch())
            engine.backward(loss)
            engine.step()
            found["losses"].append(loss.item())
        found["norms"].append(engine.get_global_grad_norm())
    state = engine.optimizer.state_dict()["state"]
    found["state"] = {key: {name: state[key][name] for name in state[key]} for key in state}
    found["weights"] = engine.module_state_dict()
    return found


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def both(folder: Path, **asked: Any) -> None:
    found = []
    for early in (False, True):
        engine = engine_with(folder, early=early, **asked)
        found.append(trained(engine))
        engine.destroy()
    assert_same(*found)


@pytest.mark.parametrize(("weights", "state"), [("none", "none"), ("cpu", "cpu"), ("none", "nvme"), ("nvme", "nvme")])
def test_the_bits_are_those_of_a_step_after_backward(tmp_path: Path, weights: str, state: str) -> None:
    both(tmp_path, weights=weights, state=state, dtype="fp32" if state == "cpu" else "bf16")


@pytest.mark.parametrize("name", ["split-bf16", "compact"])
def test_formats_that_round_give_the_same_bits(tmp_path: Path, name: str) -> None:
    both(tmp_path, own={"format": name})


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_that_are_always_there_give_the_same_bits(tmp_path: Path, stage: int) -> None:
    disk = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}} if stage else {}
    both(tmp_path, zero_optimization={"stage": stage, **disk})


@pytest.mark.parametrize("home", ["auto", "host", "disk"])
def test_micro_batches_add_up_before_the_last_updates(tmp_path: Path, home: str) -> None:
    both(tmp_path, gradient_accumulation_steps=3, own={"gradients": home}, model=lambda: Stack(repeats=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_inside_of_backward_comes_before_the_update(tmp_path: Path, reentrant: bool) -> None:
    both(tmp_path, model=lambda: Stack(recomputes=reentrant))


def test_a_durable_run_goes_on_from_its_last_step(tmp_path: Path) -> None:
    """The one that ends inside of a step has half of it on disk, in the places of the commit to come."""
    own = {"durable_every": 1}
    (tmp_path / "usual").mkdir()
    usual = engine_with(tmp_path / "usual", early=False)
    expected = trained(usual)
    usual.destroy()
    first = engine_with(tmp_path, early=True, own=own)
    batch, losses = batches(), []

    def step(engine: Engine, number: int) -> None:
        engine.optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
        loss = loss_of(engine, batch())
        losses.append(loss.item())
        engine.backward(loss)

    for number in range(2):
        step(first, number)
        first.step()
    tokens = batch()
    first.optimizer.param_groups[0]["lr"] = 1e-2 / 3
    first.backward(loss_of(first, tokens))
    first.finish_step()
    first.destroy()
    second = engine_with(tmp_path, early=True, own=own)
    assert second.resume() == 2
    second.optimizer.param_groups[0]["lr"] = 1e-2 / 3
    loss = loss_of(second, tokens)
    second.backward(loss)
    second.step()
    assert [*losses, loss.item()] == expected["losses"]
    assert_same(second.module_state_dict(), expected["weights"])
    second.destroy()


@pytest.mark.parametrize("state", ["cpu", "nvme"])
def test_gradients_need_room_for_two_units_and_no_disk(tmp_path: Path, state: str) -> None:
    engine = engine_with(tmp_path, early=True, weights="cpu", state=state)
    plan = engine.parts.plan
    trained(engine, steps=2)
    # bf16: the table has a room of its own, and two blocks share what is left.
    block = 2 * 200 * WIDTH + 200 + WIDTH
    table = 256 * WIDTH
    assert plan.gradients is Home.CONSUMED
    assert plan.buckets["gradients"] == pytest.approx(2 * (table + 2 * block), rel=0.1)
    assert engine.parts.core().usage()["gradients"][1] == plan.buckets["gradients"]
    engine.destroy()
    usual = engine_with(tmp_path, early=False, weights="cpu", state=state)
    assert usual.parts.plan.buckets["gradients"] == pytest.approx(2 * (table + BLOCKS * block), rel=0.1)
    assert usual.parts.plan.disk_bytes == plan.disk_bytes
    usual.destroy()


def test_units_are_updated_while_backward_goes_on(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, early=True, model=lambda: Watched(at=0))
    updated = []

    def count() -> int:
        return engine.io()["tiles_updated"]

    def note(grad: torch.Tensor) -> torch.Tensor:
        updated.append(count())
        return grad

    Between.act = note
    for before in (0, None):
        if before is None:
            engine.finish_step()
            before = count()
        engine.backward(loss_of(engine, batches()()))
        tiles = engine.parts.plan.tile_elements
        # Two blocks have room: when backward comes to the table, those of which the others took it are updated.
        assert updated.pop() - before >= 2 * (2 * 200 * WIDTH // tiles)
        # All begins before the step, which only ends it.
        engine.finish_step()
        all_of_them = count()
        engine.step()
        engine.finish_step()
        assert count() == all_of_them > before
    engine.destroy()


@pytest.mark.parametrize("weights", ["nvme", "cpu"])
def test_what_sees_a_step_half_made_is_refused(tmp_path: Path, weights: str) -> None:
    engine = engine_with(tmp_path, early=True, weights=weights)
    batch = batches()
    tokens = batch()
    loss = loss_of(engine, tokens)
    engine.backward(loss)
    param = engine.module.blocks[2][0].weight
    for call in (
        lambda: zeroxide.safe_get_full_grad(param),
        lambda: zeroxide.safe_get_full_fp32_param(param),
        engine.zero_grad,
        engine.module_state_dict,
        lambda: engine.save_checkpoint(tmp_path / "saved", leave_out_gradients=True),
        lambda: loss_of(engine, tokens),
        lambda: engine.module.blocks[2](torch.ones(1, WIDTH, dtype=torch.bfloat16)),
        lambda: engine.backward(loss),
    ):
        with pytest.raises(ModelError, match=r"update_in_backward.*engine\.step\(\)"):
            call()
    with torch.no_grad(), pytest.raises(ModelError, match=r"forward between.*engine\.step\(\)"):
        engine(tokens)
    engine.optimizer.param_groups[0]["lr"] = 5e-2
    with pytest.raises(ModelError, match="a hyperparameter has changed since backward began"):
        engine.step()
    engine.optimizer.param_groups[0]["lr"] = 1e-2
    engine.step()
    usual = engine_with(tmp_path, early=False)
    usual.backward(loss_of(usual, tokens))
    usual.step()
    assert_same(engine.module_state_dict(), usual.module_state_dict())
    engine.destroy()
    usual.destroy()


def test_a_backward_that_is_not_the_last_has_no_room(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, early=True)
    tokens = batches()()
    loss = loss_of(engine, tokens)
    engine.set_gradient_accumulation_boundary(False)
    with pytest.raises(ModelError, match=r"leaves them no room.*gradient_accumulation_steps"):
        engine.backward(loss)
    engine.set_gradient_accumulation_boundary(True)
    with engine.no_sync(), pytest.raises(ModelError, match="leaves them no room"):
        engine.backward(loss)
    engine.set_gradient_clipping(1.0)
    with pytest.raises(ConfigError, match="gradient clipping is 1 now"):
        engine.backward(loss)
    engine.set_gradient_clipping(0.0)
    engine.backward(loss)
    engine.set_gradient_accumulation_boundary(False)
    with pytest.raises(ModelError, match="would be no optimizer step"):
        engine.step()
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    assert engine.global_steps == 1
    engine.destroy()


def test_a_module_that_runs_twice_has_no_room(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, early=True, model=lambda: Stack(repeats=True))
    with pytest.raises(ModelError, match=r"blocks\.0 was used twice since.*zeroxide\.gradients"):
        engine.backward(loss_of(engine, batches()()))
    engine.destroy()
    both(tmp_path, model=lambda: Stack(repeats=True), own={"gradients": "host"})


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("way", ["engine.backward", "loss.backward"])
def test_a_backward_that_fails_after_an_update_says_that_the_state_is_mixed(
    tmp_path: Path, way: str, value: float | None
) -> None:
    Between.act = raises if value is None else lambda grad: grad * value
    engine = engine_with(tmp_path, early=True, model=lambda: Watched(at=2))
    loss = loss_of(engine, batches()())
    with pytest.raises((ValueError, ModelError), match=r"a hook of the user's|gradient of blocks\.1 is not finite"):
        engine.backward(loss) if way == "engine.backward" else loss.backward()
    for call in (engine.step, lambda: engine(batches()()), engine.module_state_dict):
        with pytest.raises(StorageError, match="failed half way and its state is mixed"):
            call()
    engine.destroy()


def test_a_backward_that_fails_before_an_update_changes_nothing(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, early=True, model=lambda: Watched(at=BLOCKS))
    tokens = batches()()
    before = engine.module_state_dict()
    Between.act = raises
    with pytest.raises(ValueError, match="a hook of the user's"):
        engine.backward(loss_of(engine, tokens))
    Between.act = lambda grad: grad * float("inf")
    with pytest.raises(ModelError, match=r"gradient of blocks\.3 is not finite.*0 units are updated"):
        engine.backward(loss_of(engine, tokens))
    assert_same(engine.module_state_dict(), before)
    Between.act = lambda grad: grad
    engine.backward(loss_of(engine, tokens))
    engine.step()
    usual = engine_with(tmp_path, early=False)
    usual.backward(loss_of(usual, tokens))
    usual.step()
    assert_same(engine.module_state_dict(), usual.module_state_dict())
    engine.destroy()
    usual.destroy()


class ReadsLate(nn.Module):
    """Whose input's gradient needs a weight after that weight's own gradient is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x) * self.blocks[1].weight[0].detach())


@pytest.mark.parametrize("weights", ["none", "nvme"])
def test_a_weight_that_backward_reads_after_its_update_is_refused(tmp_path: Path, weights: str) -> None:
    engine = engine_with(tmp_path, early=True, weights=weights, model=ReadsLate, own={"gradients": "host"})
    loss = engine(torch.ones(2, WIDTH, dtype=torch.bfloat16)).sum()
    with pytest.raises((RuntimeError, ModelError), match=r"modified by an inplace operation|used after backward began"):
        engine.backward(loss)
    engine.destroy()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gradient_clipping": 1.0, "weights": "cpu"}, "gradient_clipping 1 needs the norm"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}, "state": "cpu"}, "fp16 leaves a step out"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation false leaves open"),
        ({"own": {"accumulation_order": "layers"}}, 'accumulation_order "layers" is not built'),
    ],
    ids=["clipping", "fp16", "unmanaged", "layers"],
)
def test_what_must_know_all_gradients_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        engine_with(tmp_path, early=True, **changes)
    assert caught.value.path == "zeroxide.update_in_backward"
    engine_with(tmp_path, early=False, **changes).destroy()


def test_experts_that_make_up_for_missed_steps_are_refused() -> None:
    config = load({"gradient_clipping": 0, "zeroxide": {"update_in_backward": True, "unrouted_experts": "lazy"}})
    with pytest.raises(ConfigError, match='unrouted_experts "lazy" makes up for missed steps'):
        plan_early_updates(config, Ranks(), torch.device("cpu"))

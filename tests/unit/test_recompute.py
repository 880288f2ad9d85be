"""Blocks whose activations are computed again in backward: the bits of a run that keeps them, whatever blocks are like.

The oracle is the same engine that keeps all activations, which other tests hold against plain PyTorch.
"""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from zeroxide.config import load
from zeroxide.errors import ConfigError, ModelError, ZeroxideError
from zeroxide.plan.recompute import plan_recompute

WIDTH, LAYERS, BATCH = 32, 6, 16


class Block(nn.Module):
    """How often its forward ran is known of each kind of block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.runs += 1
        return x + functional.dropout(self.down(functional.gelu(self.up(x))), 0.25)


class Dicts(Block):
    """Takes a nested container and a keyword argument, and gives them."""

    def forward(self, both, *, scale):
        return {"both": (super().forward(both[0]) * scale, both[1]), "count": 3}


class Draws(Block):
    """Draws from the generators of Python and numpy."""

    def forward(self, x):
        return super().forward(x * torch.tensor(1 + random.random()) * torch.tensor(1 + np.random.random()).float())


class InPlace(Block):
    """Changes what it was given, inside of a container."""

    def forward(self, both):
        changed = both[0].add_(1.0)
        return (super().forward(changed),)


class Counts(Block):
    """Changes a buffer, of which torch's version counter knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x):
        return functional.batch_norm(super().forward(x), self.mean, self.variance, training=True)


class Replaces(Block):
    """Has another buffer after each forward but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        if self.runs:
            self.count = self.count + 1
        return super().forward(x)


class Model(nn.Module):
    def __init__(self, kind: type[Block] = Block, how: str = "plain") -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(kind() for _ in range(LAYERS))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.through(block, x)
        return self.head(x).square().mean()

    def through(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.how == "twice":
            return block(block(x))
        if self.how == "dicts":
            return block([x, None], scale=torch.tensor(1.5))["both"][0]
        if self.how == "in place":
            return block((x * 1.0,))[0]
        if self.how in ("reentrant", "other"):
            return checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return block(x)


def started(asked: Any, model: nn.Module, stage: int = 3, folder: Path | None = None, **own: Any):
    disk = {"device": "nvme", "nvme_path": str(folder)}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "gradient_accumulation_steps": own.pop("micro_batches", 1),
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, **({} if folder is None else {"offload_param": disk})},
        "zeroxide": {"threads": 1, "recompute": asked, **own},
    }
    return zeroxide.initialize(model=model, config=config)[0]


@contextmanager
def started_and_ended(*args: Any):
    engine = started(*args)
    try:
        yield engine
    finally:
        engine.destroy()


def data(seed: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))


def outcome(engine: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        loss = engine(data(seed))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        # What forward drew, and backward not again.
        losses += [torch.rand(1).item(), random.random(), np.random.random()]
    weights = dict(engine.module_state_dict())
    engine.destroy()
    return losses, weights


def found(asked: Any, model: Any = Model, stage: int = 3, folder: Path | None = None, **own: Any) -> Any:
    torch.manual_seed(0)
    return outcome(started(asked, model(), stage, folder, **own))


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_bits_are_those_of_activations_that_are_kept(stage, tmp_path):
    """Catches: random numbers of another moment, weights that are not there when a block runs again."""
    plain = found("none", stage=stage)
    assert len(set(plain[0])) == len(plain[0]), "training does something"
    for asked in (1, LAYERS - 1, "all"):
        assert_same(found(asked, stage=stage), plain)
    if stage == 3:
        assert_same(found(3, folder=tmp_path), plain)


def test_so_many_of_the_first_blocks_run_twice():
    """Catches: the last blocks, whose activations backward wants first, or all of them."""
    for asked, again in ((0, 0), ("none", 0), (2, 2), ("all", LAYERS)):
        model = Model()
        engine = started(asked, model)
        engine.backward(engine(data(0)))
        assert [each.runs for each in model.blocks] == [2] * again + [1] * (LAYERS - again)
        with torch.no_grad():
            engine(data(1))
        assert [each.runs for each in model.blocks] == [3] * again + [2] * (LAYERS - again)
        lines = [each for each in engine.plan().describe() if "computed again" in each]
        each = {2: "2 of 6 blocks computed again in backward: blocks.0 to blocks.1"}
        assert lines == ([f"activations of {each[asked]}"] if asked in each else lines if again else [])
        engine.destroy()


class Tied(Model):
    """Two blocks have one weight, and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up.weight = self.blocks[4].up.weight
        self.blocks[2].requires_grad_(False)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", ["twice", "dicts", "draws", "tied", "reentrant", "other", "cut", "hooked"])
def test_whatever_blocks_are_like(case, stage, monkeypatch):
    """Used twice; with keyword arguments and containers; with generators that are not torch's; with weights that two of
    them have; in a model that checkpoints them itself; of several units; with hooks of the user's, which run once.
    Catches: what is saved of one use for the other, and hooks around the recomputation."""
    own = {"unit_bytes": 1 << 20}
    made = {"draws": lambda: Model(Draws), "tied": Tied, "dicts": lambda: Model(Dicts, "dicts")}
    model = made.get(case, lambda: Model(how=case))
    calls: list[int] = []
    if case == "hooked":

        def model() -> nn.Module:
            made = Model()
            for each in made.blocks:
                each.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
                each.register_forward_hook(lambda module, args, result: calls.append(1) or result * 0.5)
            return made

    if case == "cut":
        monkeypatch.setattr("zeroxide.plan.discover.DEFAULT_UNIT_BYTES", 3 * WIDTH * WIDTH)
        own = {}
    plain = found("none", model, stage, **own)
    counted = len(calls)
    assert_same(found(4, model, stage, **own), plain)
    assert len(calls) == 2 * counted


REFUSED = {
    "in-place-blocks": "changes in place what it is given",
    "conv": r"changes its buffer 1\.",
    "recurrent": "no nn.ModuleList",
    "hf-gpt2-reentrant": "checkpoints its activations itself",
    "hf-gpt2-nonreentrant": "checkpoints its activations itself",
}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_models_of_all_kinds(family):
    """Each as without, or refused by name."""
    runs = []
    for asked in ("none", "all"):
        model = models.build(family).train()
        for each in model.modules():
            if hasattr(each, "config"):
                each.config.use_cache = False
        if asked == "all" and family in REFUSED:
            with pytest.raises(ZeroxideError, match=REFUSED[family]), started_and_ended(asked, model) as engine:
                engine(**models.batches(family, 1)[0])
            return
        with started_and_ended(asked, model) as engine:
            losses = []
            for batch in models.batches(family, 2):
                loss = models.loss_of(engine(**batch))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            runs.append((losses, dict(engine.module_state_dict())))
    assert_same(*runs)


def test_several_micro_batches_layer_by_layer():
    """Catches: random numbers that another micro-batch has drawn from in between."""
    runs = []
    for asked in ("none", 4):
        torch.manual_seed(0)
        own = {"micro_batches": 3, "accumulation_order": "layers", "micro_batch_seeds": True}
        engine = started(asked, Model(), **own)
        torch.manual_seed(1)
        losses = [float(engine.train_batch(iter([data(0), data(1), data(2)]))) for _ in range(2)]
        weights = dict(engine.module_state_dict())
        engine.destroy()
        runs.append((losses, weights))
    assert_same(*runs)


def test_what_is_kept_waits_on_disk_beside(tmp_path, monkeypatch):
    """Three of six blocks are computed again, and what the others keep is on disk. Catches: a block whose activations
    are on disk as well though it computes them again."""
    monkeypatch.setattr("zeroxide.zero.activations_on_disk.MIN_BYTES", 512)
    plain, written = found("none"), []
    for asked in (0, 3, "all"):
        torch.manual_seed(0)
        own = {"activations": "disk", "activation_path": str(tmp_path), "activation_buffers": 1 << 16}
        engine = started(asked, Model(), 3, tmp_path, **own)
        file = engine.parts.activations.file
        assert_same(outcome(engine), plain)
        written.append(file.most)
    assert written[0] > written[1] > written[2]


def test_weights_are_read_as_often_as_without(tmp_path):
    """A unit is there for the whole of its turn in backward. Catches: a second read for the recomputation."""
    reads = []
    for asked in ("none", LAYERS - 1):
        engine = started(asked, Model(), folder=tmp_path, prefetch=0)
        for step in range(4):
            if step == 3:
                engine.finish_step()
                before = engine.io()["read_bytes"]
            engine.backward(engine(data(step)))
            if step < 3:
                engine.step()
        reads.append(engine.io()["read_bytes"] - before)
        engine.destroy()
    assert reads[0] == reads[1] > 0


def test_freed_activations_leave_the_process(monkeypatch):
    """Catches: an allocator that fills the holes of activations that have gone, so that the peak is another than the
    plan's."""
    asked: list[int | None] = []
    monkeypatch.setattr("zeroxide.engine.heap._core.keep_freed_memory", lambda largest=None: asked.append(largest))
    for blocks in (0, 1):
        started(blocks, Model()).destroy()
    assert asked == [None, 1 << 20]


def test_a_copy_and_a_model_that_is_left_have_the_forward_of_their_class(monkeypatch):
    """Catches: a copy that runs the weights of the model it was made of."""
    model = Model()
    engine = started("all", model, stage=2)
    assert "forward" in model.blocks[0].__dict__
    other = copy.deepcopy(engine.module)
    assert "forward" not in other.blocks[0].__dict__
    engine.destroy()
    assert "forward" not in model.blocks[0].__dict__

    def fail(*_: Any) -> None:
        assert "forward" in model.blocks[0].__dict__
        raise ModelError("late")

    monkeypatch.setattr("zeroxide.engine.build.prepare_heap", fail)
    with pytest.raises(ModelError, match="late"):
        started("all", model)
    assert "forward" not in model.blocks[0].__dict__


def test_a_forward_of_the_users_own_stays():
    model = Model()
    before = lambda x, plain=model.blocks[1].forward: plain(x) * 2  # noqa: E731
    model.blocks[1].forward = before
    engine = started(2, model)
    engine.backward(engine(data(0)))
    assert [each.runs for each in model.blocks] == [2, 2, 1, 1, 1, 1]
    engine.destroy()
    assert model.blocks[1].forward is before


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "buffer"), [(Counts, "mean"), (Replaces, "count")])
def test_a_buffer_that_would_change_twice_is_refused(kind, buffer):
    """Catches: running means of two batches instead of one."""
    engine = started(2, Model(kind))
    if kind is Replaces:
        engine(data(0))
    with pytest.raises(ModelError, match=rf"blocks\.0 changes its buffer {buffer} in forward"):
        engine(data(0))
    engine.destroy()


def test_what_is_changed_in_place_is_refused():
    """Catches: a recomputation from other values."""
    engine = started(1, Model(InPlace, "in place"))
    with pytest.raises(ModelError, match=r"blocks\.0 changes in place what it is given"):
        engine(data(0))
    engine.destroy()


def test_a_cache_that_would_grow_twice_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=1, vocab_size=16, n_positions=8)
    ids = torch.zeros((1, 4), dtype=torch.int64)
    engine = started("all", transformers.GPT2LMHeadModel(config))
    with pytest.raises(ModelError, match=r"transformer\.h\.0 is given a \w*Cache of keys and values.*use_cache=False"):
        engine(input_ids=ids, labels=ids, use_cache=True)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.destroy()
    own = transformers.GPT2LMHeadModel(config)
    own.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match=r"checkpoints its activations itself .*gradient_checkpointing_disable"):
        started("all", own)


@pytest.mark.parametrize(
    ("asked", "model", "said"),
    [
        (7, Model(), r'recompute: 7: Model has 6 blocks, blocks.0 to blocks.5; expected "none", "all" or up to 6'),
        ("all", nn.Linear(2, 2), r'recompute: "all": Linear has no nn.ModuleList of two blocks'),
        ("auto", Model(), r'"auto" is for zeroxide plan and zeroxide train --recompute'),
        ("some", Model(), r'recompute: expected "none", "all" or how many'),
        (-1, Model(), r'recompute: expected "none", "all" or how many'),
        (True, Model(), r'recompute: expected "none", "all" or how many'),
    ],
)
def test_what_cannot_be_asked_for(asked, model, said):
    with pytest.raises(ConfigError, match=said) as caught:
        started(asked, model)
    assert caught.value.path == "zeroxide.recompute"


def test_a_pipeline_has_another_key():
    config = load({"pipeline": {"stages": 2}, "zeroxide": {"recompute": 2}}, world_size=2)
    with pytest.raises(ConfigError, match=r"recompute: 2: stages of a pipeline are not built for it"):
        plan_recompute(Model(), config)


def test_containers_are_recomputed_by_what_is_called_of_them():
    """Catches: a block without a forward of its own, whose activations stay."""
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"a": Block(), "b": Block()}) for _ in range(2))
    asked = SimpleNamespace(activations=SimpleNamespace(recompute=1), pipeline=None)
    plan = plan_recompute(model, asked)
    assert plan.names == ("blocks.0",)
    assert [each.module for each in plan.modules] == list(model.blocks[0].values())

"""Micro-batches layer by layer have the bits of micro-batches one after the other.

What is compared is everything that a run leaves: losses, norms, weights, exact weights and moments. The other side is
the loop that users write, `forward`, `backward`, `step`, and for gradients plain torch.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from models import FAMILIES, Block, Gpt, batches, build, loss_of, next_token_loss
from running import Mode, Outcome, assert_same, config_of, started, state_of, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from zeroxide.errors import ModelError
from zeroxide.zero.hooks import Hooks
from zeroxide.zero.layer_order import LayerOrder
from zeroxide.zero.reduce import large_weights

HOMES = ("none", "cpu", "nvme")
STAGES = [
    (0, Mode()),
    *((stage, Mode("none", optimizer)) for stage, optimizer in itertools.product((1, 2), HOMES)),
    *((3, Mode(param, optimizer)) for param, optimizer in itertools.product(HOMES, HOMES)),
]


def config_for(mode, directory, order, count, dtype="fp32", stage=3, **more):
    config = config_of(mode, directory, dtype, gradient_accumulation_steps=count, **more)
    config["zero_optimization"]["stage"] = stage
    if stage < 3:
        del config["zero_optimization"]["offload_param"]
    config["zeroxide"] = config["zeroxide"] | {"accumulation_order": order}
    return config


def outcome_of(engine, outcome):
    outcome.weights, outcome.state = weights_of(engine), state_of(engine)
    outcome.buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return outcome


def by_hand(model, config, feed, steps):
    """The loop that users write."""
    outcome, count = Outcome(), config["gradient_accumulation_steps"]
    feed = iter(feed)
    with started(model, config=config) as engine:
        for _ in range(steps):
            losses = []
            for _ in range(count):
                loss = loss_of(engine(**next(feed)))
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach().float())
            outcome.losses.append(float(torch.stack(losses).mean()))
            outcome.norms.append(float(engine.get_global_grad_norm()))
            outcome.rates.append(engine.get_lr())
        return outcome_of(engine, outcome)


def by_call(model, config, feed, steps, around=nullcontext):
    """`train_batch`."""
    outcome = Outcome()
    feed = iter(feed)
    with started(model, config=config) as engine:
        for _ in range(steps):
            with around():
                outcome.losses.append(float(engine.train_batch(feed)))
            outcome.norms.append(float(engine.get_global_grad_norm()))
            outcome.rates.append(engine.get_lr())
        assert engine.global_steps == steps
        assert engine.micro_steps == steps * config["gradient_accumulation_steps"]
        return outcome_of(engine, outcome)


@pytest.fixture
def switches(monkeypatch):
    """How often a micro-batch handed on to another, in forward and in backward."""
    found = {True: 0, False: 0}
    plain = LayerOrder._hand_on

    def counted(self, each):
        found[self._forward] += self._next() != each.number
        plain(self, each)

    monkeypatch.setattr(LayerOrder, "_hand_on", counted)
    return found


@pytest.mark.parametrize(("stage", "mode"), STAGES, ids=[f"{stage}-{mode}" for stage, mode in STAGES])
def test_stages_and_homes(stage, mode, tmp_path, switches):
    """Catches gradients added in another order, units released too soon, and turns that are not taken."""
    count = 8 if stage == 3 else 2
    feed = batches("gpt", 2 * count, rows=1)
    made = {}
    for order in ("batches", "layers"):
        config = config_for(mode, tmp_path, order, count, stage=stage, gradient_clipping=0.5)
        made[order] = by_call(build("gpt"), config, feed, 2)
    # Four blocks, and what comes before the first.
    assert switches == {True: 2 * 4 * count, False: 2 * 4 * count}
    assert_same(made["layers"], made["batches"], "layers")
    expected = by_hand(build("gpt"), config_for(mode, tmp_path, "batches", count, stage=stage, gradient_clipping=0.5),
                       feed, 2)  # fmt: skip
    assert_same(made["batches"], expected, "train_batch")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "nested-output"])
def test_families(family, dtype, tmp_path):
    """Tied and frozen parameters, checkpointing of both kinds, modules used twice or not at all, convolutions."""
    if dtype not in FAMILIES[family].dtypes:
        pytest.skip("not trained in it")
    feed = batches(family, 6)
    mode = Mode("nvme", "cpu") if dtype == "bf16" else Mode()
    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}}
    found = []
    for order, run in (("batches", by_hand), ("layers", by_call)):
        model = build(family)
        model.train()
        found.append(run(model, config_for(mode, tmp_path, order, 3, dtype, scheduler=schedule), feed, 2))
    assert_same(found[1], found[0], family)


def test_gradients_are_those_of_plain_torch(tmp_path):
    model, feed = build("gpt"), batches("gpt", 4)
    plain = copy.deepcopy(model)
    for batch in feed:
        (plain(**batch) / 4).backward()
    with started(model, config=config_for(Mode(), tmp_path, "layers", 4)) as engine:
        engine._window.accumulate(iter(feed), None)
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(zeroxide.safe_get_full_grad(mine), theirs.grad), name


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_large_weights(tied, tmp_path, monkeypatch):
    """Gradients that go past autograd in parts: of one use they do here as well, of several none may."""
    monkeypatch.setattr(large_weights, "LARGE", 1000)
    monkeypatch.setattr(large_weights, "PART", 500)
    found = []
    for order, run in (("batches", by_hand), ("layers", by_call)):
        model = build("gpt")
        if not tied:
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        found.append(run(model, config_for(Mode(), tmp_path, order, 4), batches("gpt", 8), 2))
    assert_same(found[1], found[0], "large weights")


def test_fp16_and_its_loss_scale(tmp_path):
    """With a scale that overflows at first: the step is left out in both orders."""
    found = []
    for order, run in (("batches", by_hand), ("layers", by_call)):
        config = config_for(Mode(), tmp_path, order, 3, "fp16")
        config["fp16"] |= {"initial_scale_power": 17, "hysteresis": 1}
        model = build("gpt")
        with started(model, config=config) as engine:
            feed, losses = iter(batches("gpt", 18)), []
            for _ in range(6):
                if run is by_call:
                    losses.append(float(engine.train_batch(feed)))
                    continue
                own = []
                for _ in range(3):
                    loss = engine(**next(feed))
                    engine.backward(loss)
                    engine.step()
                    own.append(loss.detach().float())
                losses.append(float(torch.stack(own).mean()))
            assert 0 < engine.skipped_steps < 6
            found.append((losses, engine.skipped_steps, engine.loss_scale(), state_of(engine)))
    assert found[0][:3] == found[1][:3]
    for name, parts in found[0][3].items():
        assert all(torch.equal(a, b) for a, b in zip(parts, found[1][3][name], strict=True)), name


@pytest.mark.parametrize("whose", ["engine's", "caller's"])
def test_autocast(whose, tmp_path):
    """The caller's own is a setting of its thread, which others have to take over."""
    more = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if whose == "engine's" else {}
    found = []
    for order in ("batches", "layers"):
        around = nullcontext if more else (lambda: torch.autocast("cpu", torch.bfloat16))
        config = config_for(Mode(), tmp_path, order, 3, **more)
        found.append(by_call(build("gpt"), config, batches("gpt", 6), 2, around))
    assert_same(found[1], found[0], "autocast")
    other = by_call(build("gpt"), config_for(Mode(), tmp_path, "layers", 3), batches("gpt", 6), 2)
    assert other.losses != found[0].losses


class Wanders(Gpt):
    """Takes another way through its blocks for each micro-batch, as the first token says."""

    def hidden(self, input_ids):
        hidden, first = self.wte(input_ids), int(input_ids[0, 0])
        order = [(first + at) % len(self.h) for at in range(len(self.h) - first % 2)]
        for at in order:
            hidden = self.h[at](hidden)
        return self.norm(hidden)


class Cut(Gpt):
    """Cuts the graph in the middle of the model for some micro-batches."""

    def hidden(self, input_ids):
        hidden = self.wte(input_ids)
        for at, block in enumerate(self.h):
            hidden = block(hidden)
            if at == 1 and int(input_ids[0, 0]) % 2:
                hidden = hidden.detach()
        return self.norm(hidden)


class Repeats(Gpt):
    """Goes through its blocks twice; `reentrant` computes them again in a backward within backward."""

    def __init__(self, reentrant):
        super().__init__(layers=3)
        self.reentrant = reentrant

    def hidden(self, input_ids):
        hidden = self.wte(input_ids)
        for block in (*self.h, *self.h):
            hidden = block(hidden) if not self.reentrant else checkpoint(block, hidden, use_reentrant=True)
        return self.norm(hidden)


class Early(Gpt):
    """Uses a parameter at the root at one end of the model or the other, as the first token says."""

    def __init__(self):
        super().__init__(layers=3)
        self.scale = nn.Parameter(torch.full((48,), 1.5))

    def hidden(self, input_ids):
        hidden, early = self.wte(input_ids), int(input_ids[0, 0]) % 2
        if early:
            hidden = hidden * self.scale
        for block in self.h:
            hidden = block(hidden)
        return self.norm(hidden if early else hidden * self.scale)


class Experts(Gpt):
    """Blocks that use one of two layers, as the first token says."""

    def __init__(self):
        super().__init__(layers=0)
        self.h = nn.ModuleList(Choice() for _ in range(3))

    def hidden(self, input_ids):
        hidden = self.wte(input_ids)
        for block in self.h:
            hidden = block(hidden, int(input_ids[0, 0]) % 2)
        return self.norm(hidden)


class Choice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, hidden, which):
        return (self.b if which else self.a)(hidden)


ODD = {
    "wanders": (Wanders, False),
    "cut": (Cut, True),
    "repeats": (lambda: Repeats(False), True),
    "repeats-reentrant": (lambda: Repeats(True), False),
    "early": (Early, True),
    "experts": (Experts, True),
}


@pytest.mark.parametrize("mode", [Mode(), Mode("nvme", "cpu")], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_models_that_go_their_own_way(name, mode, tmp_path, switches):
    """Right results in whatever order keeps them, and never a standstill."""
    make, by_layer = ODD[name]
    found = []
    for order, run in (("batches", by_hand), ("layers", by_call)):
        torch.manual_seed(0)
        found.append(run(make(), config_for(mode, tmp_path, order, 5), batches("gpt", 10), 2))
    assert_same(found[1], found[0], name)
    assert bool(switches[False]) == by_layer


def test_one_after_the_other_each_backward_gathers_its_layers(tmp_path, monkeypatch):
    """Where forwards went different ways: catches layers that count as done since an earlier micro-batch is, whose
    weights then come by faults, one read at a time."""
    held = []
    plain = Hooks._hold
    monkeypatch.setattr(Hooks, "_hold", lambda self, unit: held.append(unit.name) or plain(self, unit))
    torch.manual_seed(0)
    feed = batches("gpt", 3)
    with started(Wanders(), config=config_for(Mode("nvme", "cpu"), tmp_path, "layers", 3)) as engine:
        engine.train_batch(iter(feed))
    used = sum(4 - int(batch["input_ids"][0, 0]) % 2 for batch in feed)
    assert len([name for name in held if name != "root"]) == used


def test_a_gradient_out_of_order_is_an_error(tmp_path):
    """A parameter whose gradient comes twice, in a way that no hook sees: named, not added wrongly."""

    class Hidden(Gpt):
        def hidden(self, input_ids):
            hidden = self.wte(input_ids)
            for at, block in enumerate(self.h):
                hidden = block(hidden)
                if at in (0, 2):
                    hidden = checkpoint(lambda x: x * self.norm.weight, hidden, use_reentrant=True)
            return self.norm(hidden)

    torch.manual_seed(0)
    with started(Hidden(), config=config_for(Mode(), tmp_path, "layers", 3)) as engine:
        with pytest.raises(ModelError, match=r'norm\.weight.*"batches"'):
            engine.train_batch(iter(batches("gpt", 3)))
        assert engine.global_steps == 0


def test_next_token_loss_with_a_loss_function(tmp_path):
    """(inputs, labels): the loss function runs in the micro-batch's own thread."""

    class Logits(Gpt):
        def forward(self, input_ids):
            return self.logits(input_ids)

    found = []
    for order in ("batches", "layers"):
        torch.manual_seed(0)
        ids = [batch["input_ids"] for batch in batches("gpt", 6)]
        outcome = []
        with started(Logits(), config=config_for(Mode("nvme", "nvme"), tmp_path, order, 3)) as engine:
            feed = iter([(each, each) for each in ids])
            outcome += [float(engine.train_batch(feed, next_token_loss)) for _ in range(2)]
            found.append((outcome, weights_of(engine)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())

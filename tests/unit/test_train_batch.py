"""`train_batch`: what it takes, what it refuses by name, and what is left after an error."""

from __future__ import annotations

import _thread
import ctypes
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Gpt, batches, build
from running import Mode, config_of, started, state_of, weights_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import zeroxide
from zeroxide.config import load
from zeroxide.distributed import Ranks
from zeroxide.errors import ConfigError, DataError, ModelError
from zeroxide.parallel.pipe import PipelineModule
from zeroxide.plan.checks import check_order

ORDERS = ["batches", "layers"]
MODE = Mode("nvme", "nvme")


def config_for(directory, order, count=3, mode=MODE, **own):
    config = config_of(mode, directory, "fp32", gradient_accumulation_steps=count)
    config["zeroxide"] = config["zeroxide"] | {"accumulation_order": order, **own}
    return config


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def own_threads():
    return [each.name for each in threading.enumerate() if each.name.startswith("zeroxide-micro-batch")]


class Failing(Gpt):
    """Fails where it is told: in the forward or the backward of a block, for one micro-batch."""

    def __init__(self, where, error=ValueError, checkpointing=None):
        super().__init__(checkpointing=checkpointing)
        self.where, self.error, self.armed, self.seen = where, error, True, 0

    def hidden(self, input_ids):
        number, self.seen = self.seen, self.seen + 1
        hidden = self.wte(input_ids)
        for at, block in enumerate(self.h):
            if self.checkpointing is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.checkpointing)
            if self.armed and number == 1 and at == 2:
                if self.where == "forward":
                    raise self.error("as told")
                hidden.register_hook(self.fail)
        return self.norm(hidden)

    def fail(self, grad):
        if self.armed:
            raise self.error("as told")


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_error_in_one_micro_batch_ends_all_and_the_engine_goes_on(order, where, error, checkpointing, tmp_path):
    """Catches threads that stay, gradients that count in the next step, and counts that have moved."""
    torch.manual_seed(0)
    model = Failing(where, error, checkpointing)
    first, second = batches("gpt", 6)[:3], batches("gpt", 6)[3:]
    with started(model, config=config_for(tmp_path, order)) as engine:
        with pytest.raises(error, match="as told") as caught:
            engine.train_batch(iter(first))
        if order == "layers":
            assert "in micro-batch 1 of 3, counted from 0" in caught.value.__notes__
        assert own_threads() == []
        assert (engine.global_steps, engine.micro_steps) == (0, 0)
        model.armed = False
        with torch.no_grad():
            evaluated = float(engine(**second[0]))
        losses = [float(engine.train_batch(iter(second))) for _ in range(2)]
        found = weights_of(engine), state_of(engine)
    torch.manual_seed(0)
    with started(Gpt(), config=config_for(tmp_path, "batches")) as engine:
        with torch.no_grad():
            assert float(engine(**second[0])) == evaluated
        assert [float(engine.train_batch(iter(second))) for _ in range(2)] == losses
        assert same(weights_of(engine), found[0])
        for name, parts in state_of(engine).items():
            assert all(torch.equal(a, b) for a, b in zip(parts, found[1][name], strict=True)), name


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_that_is_refused_leaves_nothing_of_its_micro_batches(order, tmp_path):
    """By a check before anything is counted: the next call begins anew."""
    feed = batches("gpt", 6)
    found = []
    for refused in (True, False):
        torch.manual_seed(0)
        with started(Gpt(), config=config_for(tmp_path, order, mode=Mode())) as engine:
            if refused:
                check = engine.parts.guard.before_step
                engine.parts.guard.before_step = lambda: (_ for _ in ()).throw(ModelError("refused"))
                with pytest.raises(ModelError, match="refused"):
                    engine.train_batch(iter(feed[:3]))
                engine.parts.guard.before_step = check
                assert engine.micro_steps == 0
            engine.train_batch(iter(feed[3:]))
            found.append(weights_of(engine))
    assert same(*found)


@pytest.fixture
def interruptible():
    """A shell's job in the background begins with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_all_micro_batches(tmp_path):
    """What Ctrl-C raises in the main thread, while it waits for the others."""

    class Interrupts(Gpt):
        armed = True

        def hidden(self, input_ids):
            if self.armed:
                _thread.interrupt_main()
            return super().hidden(input_ids)

    torch.manual_seed(0)
    model, feed = Interrupts(), batches("gpt", 3)
    with started(model, config=config_for(tmp_path, "layers")) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.train_batch(iter(feed))
        assert own_threads() == []
        model.armed = False
        engine.train_batch(iter(feed))
        found = weights_of(engine)
    torch.manual_seed(0)
    with started(Gpt(), config=config_for(tmp_path, "batches")) as engine:
        engine.train_batch(iter(feed))
        assert same(weights_of(engine), found)


@pytest.mark.parametrize("order", ORDERS)
def test_an_iterator_that_ends_early_ends_training(order, tmp_path):
    with started(build("gpt"), config=config_for(tmp_path, order)) as engine:
        before = weights_of(engine)
        feed = iter(batches("gpt", 5))
        with pytest.raises(StopIteration, match="ended after 2 of 3 micro-batches"):
            engine.train_batch(iter(batches("gpt", 2)))
        assert same(weights_of(engine), before)
        assert engine.micro_steps == 0
        engine.train_batch(feed)
        with pytest.raises(StopIteration, match="ended after 2 of 3"):
            engine.train_batch(feed)
        assert engine.global_steps == 1


@pytest.mark.parametrize("order", ORDERS)
def test_without_an_iterator_the_engines_loader_goes_round(order, tmp_path):
    """Five samples of one row, three micro-batches a step: the second step begins the data anew."""
    data = [{"input_ids": batch["input_ids"][0]} for batch in batches("gpt", 5, rows=1)]
    seen = []

    class Sees(Gpt):
        def forward(self, input_ids):
            seen.append(input_ids[0].tolist())
            return super().forward(input_ids)

    config = config_for(tmp_path, order) | {"train_micro_batch_size_per_gpu": 1}
    with started(Sees(), config=config, training_data=data) as engine:
        for _ in range(5):
            engine.train_batch()
    assert len(seen) == 15
    expected = sorted(each["input_ids"].tolist() for each in data)
    assert all(sorted(seen[at : at + 5]) == expected for at in (0, 5, 10))
    with (
        started(build("gpt"), config=config_for(tmp_path, order)) as engine,
        pytest.raises(DataError, match="pass an iterator"),
    ):
        engine.train_batch()


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_no_loss_is_refused(order, tmp_path):
    class Returns(Gpt):
        what = None

        def forward(self, input_ids):
            logits = self.logits(input_ids)
            return {"pair": logits, "none": {"logits": logits}, "vector": logits.mean((1, 2))}[self.what]

    model, feed = Returns(), batches("gpt", 3)
    with started(model, config=config_for(tmp_path, order)) as engine:
        for what, error, line in (
            ("none", ModelError, "the model's output, a dict, has no loss"),
            ("vector", ValueError, r"expected a scalar loss, got shape \(2,\)"),
        ):
            model.what = what
            with pytest.raises(error, match=line):
                engine.train_batch(iter(feed))
        model.what = "pair"
        with pytest.raises(DataError, match=r"\(inputs, labels\) for loss_fn, got dict"):
            engine.train_batch(iter(feed), lambda output, labels: output.mean())
        assert engine.micro_steps == 0


def test_by_hand_and_by_layer_do_not_mix(tmp_path):
    (batch,) = batches("gpt", 1)
    with started(build("gpt"), config=config_for(tmp_path, "layers")) as engine:
        for call in (
            lambda: engine(**batch),
            lambda: engine.module(**batch),
            lambda: engine.backward(torch.ones((), requires_grad=True)),
            engine.step,
        ):
            with pytest.raises(ModelError, match=r"accumulation_order is .layers.*engine\.train_batch"):
                call()
        with torch.no_grad():
            engine(**batch)
        engine.train_batch(iter([batch] * 3))
    with started(build("gpt"), config=config_for(tmp_path, "batches")) as engine:
        engine.backward(engine(**batch))
        engine.step()
        with pytest.raises(ModelError, match="1 of 3 micro-batches were made by hand"):
            engine.train_batch(iter([batch] * 3))
        for _ in range(2):
            engine.backward(engine(**batch))
            engine.step()
        engine.train_batch(iter([batch] * 3))
        engine.set_gradient_accumulation_boundary(False)
        with pytest.raises(ModelError, match="boundary was set from outside"):
            engine.train_batch(iter([batch] * 3))
        engine.set_gradient_accumulation_boundary(None)
        with engine.no_sync(), pytest.raises(ModelError, match="no_sync"):
            engine.train_batch(iter([batch] * 3))


class Draws(Gpt):
    """Draws random numbers from a generator in one of its blocks."""

    def __init__(self, which, checkpointing=None):
        super().__init__(checkpointing=checkpointing)
        self.which = which
        self.h[1].register_forward_hook(self.draw)

    def draw(self, module, args, output):
        if self.which == "torch":
            return nn.functional.dropout(output, 0.25, training=True)
        return output * (random.random() if self.which == "python" else float(np.random.rand()))


@pytest.mark.parametrize("which", ["torch", "python", "numpy"])
def test_random_numbers_in_another_order_are_refused(which, tmp_path):
    with started(Draws(which), config=config_for(tmp_path, "layers")) as engine:
        with pytest.raises(ModelError, match=r"micro-batch 0 drew.*h\.2.*zeroxide\.micro_batch_seeds"):
            engine.train_batch(iter(batches("gpt", 3)))
        assert engine.micro_steps == 0


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "nonreentrant"])
@pytest.mark.parametrize("which", ["torch", "python", "numpy"])
def test_with_seeds_of_their_own_both_orders_draw_alike(which, checkpointing, tmp_path):
    """Python's and numpy's generators are not put back by checkpointing, which recomputes other numbers than forward
    had; so with those nothing is recomputed."""
    if which != "torch" and checkpointing is not None:
        pytest.skip("not recomputed alike")
    found = []
    for order in ORDERS:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Draws(which, checkpointing)
        model.train()
        with started(model, config=config_for(tmp_path, order, micro_batch_seeds=True)) as engine:
            feed = iter(batches("gpt", 6))
            losses = [float(engine.train_batch(feed)) for _ in range(2)]
            after = torch.rand(1).item(), random.random(), float(np.random.rand())
            found.append((losses, after, weights_of(engine)))
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2])
    assert found[0][0][0] != found[0][0][1]


def test_settings_of_the_callers_thread_hold_in_others(tmp_path):
    """Catches each of them left out: a mode that sees no operation, another default device, another number of compute
    threads, another rounding of denormal numbers."""
    seen, looked, half, feed = [], [], float("0.5"), batches("gpt", 3)

    class Counts(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(threading.current_thread().name)
            return func(*args, **(kwargs or {}))

    class Looks(Gpt):
        def hidden(self, input_ids):
            looked.append((torch.get_num_threads(), torch.empty(1).device.type, half * 1e-310 == 0))
            return super().hidden(input_ids)

    threads = torch.get_num_threads()
    openmp = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line]
    # The calling thread's own number, as threadpoolctl sets it; without that library, that of all.
    set_threads = ctypes.CDLL(openmp[0]).omp_set_num_threads if openmp else torch.set_num_threads
    with started(Looks(), config=config_for(tmp_path, "layers", mode=Mode())) as engine:
        set_threads(threads + 1)
        flushes = torch.set_flush_denormal(True)
        try:
            with torch.device("meta"), Counts():
                engine.train_batch(iter(feed))
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
    assert looked == [(threads + 1, "meta", flushes)] * 3
    assert {f"zeroxide-micro-batch-{number}" for number in range(3)} <= set(seen)


def test_hooks_for_saved_tensors_and_no_gradients_are_taken_over(tmp_path):
    saved = []
    with started(build("gpt"), config=config_for(tmp_path, "layers", mode=Mode())) as engine:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(1) or tensor, lambda tensor: tensor):
            engine.train_batch(iter(batches("gpt", 3)))
        assert len(saved) > 30
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            engine.train_batch(iter(batches("gpt", 3)))


def test_what_cannot_go_layer_by_layer_is_refused(tmp_path):
    config = config_for(tmp_path, "layers") | {"flops_profiler": {"enabled": True}}
    with pytest.raises(ConfigError, match=r'accumulation_order "layers": flops_profiler') as caught:
        zeroxide.initialize(model=build("gpt"), config=config)
    assert caught.value.path == "zeroxide.accumulation_order"


@pytest.mark.parametrize("axis", ["pp", "tp", "sp", "ep"])
def test_ranks_with_other_parts_are_refused(axis):
    mesh = {"mesh": {axis: 2}} | ({"mesh": {"ep": 2, "dp_shard": 2}} if axis == "ep" else {})
    config = {"zero_optimization": {"stage": 3}, "zeroxide": {"accumulation_order": "layers", **mesh}}
    with pytest.raises(ConfigError, match=r'"layers": ranks have parts.*use "batches"'):
        check_order(load(config, world_size=2), Ranks(), torch.device("cpu"))
    alone = {"zeroxide": {"accumulation_order": "layers"}}
    check_order(load(alone, world_size=2), Ranks(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="computes on cuda"):
        check_order(load(alone, world_size=2), Ranks(), torch.device("cuda"))


@pytest.mark.parametrize("key", [{"accumulation_order": "layers"}, {"micro_batch_seeds": True}], ids=str)
def test_pipelines_have_orders_of_their_own(key):
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model = PipelineModule(layers, num_stages=1, loss_fn=nn.functional.mse_loss)
    with pytest.raises(ConfigError, match=f"zeroxide.{next(iter(key))}: in a pipeline"):
        zeroxide.initialize(model=model, lr=1e-3, config={"zeroxide": key})


def test_weights_are_read_once_a_pass(tmp_path):
    """State in host memory, so that weights alone are read, each block once for forward and once for backward, but for
    those that are still there from the pass before. Layer by layer eight micro-batches read what one does."""
    read = {}
    torch.manual_seed(0)
    for order, count in (("batches", 1), ("batches", 8), ("layers", 8)):
        config = config_for(tmp_path, order, count, mode=Mode("nvme", "cpu"))
        model = Gpt(layers=6)
        with started(model, config=config) as engine:
            feed = iter(batches("gpt", 3 * count, rows=1))
            engine.train_batch(feed)
            engine.finish_step()
            before = engine.io()["read_bytes"]
            for _ in range(2):
                engine.train_batch(feed)
                engine.finish_step()
            read[order, count] = (engine.io()["read_bytes"] - before) / 2
    assert read["layers", 8] == read["batches", 1] > 0
    assert read["batches", 8] > 5 * read["layers", 8]

"""Activations in host memory between forward and backward: the same bits, what leaves the device, what comes back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterator

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

import zeroxide
from simulated import engines
from zeroxide.device import host_pool
from zeroxide.errors import ModelError
from zeroxide.zero import saved_activations

HOMES = {"resident": {"stage": 2}, "resident-3": {"stage": 3}, "transient": {"stage": 3, "offload_param": "cpu"}}
GRAIN = 4096
WIDTH, LAYERS, BATCH = 16, 5, 64
ROW = BATCH * WIDTH * 4
"""Bytes of what a block takes and gives: one grain."""
PLACES = {"stow": 2, "restore": 2, "_let_go": 1, "_await": 1, "collect": 2}
"""How many waits each has: for memory of the host, and for the tensor; for memory of the device, and for the host's;
for what goes down; for what comes up; for both where nobody asks for it any more."""


@pytest.fixture(autouse=True)
def small(sim, monkeypatch) -> Iterator[None]:
    """Tensors of 1 KiB and more are kept, in memory of 4 KiB grains."""
    monkeypatch.setattr(saved_activations, "MIN_BYTES", 1024)
    monkeypatch.setattr(host_pool, "GRAIN", GRAIN)
    monkeypatch.setattr(host_pool, "SLAB", 8 * GRAIN)
    sim.set_delay(0, 200, seed=7)
    with engines.followed():
        yield
    assert [str(each) for each in sim.races()] == []
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped, _ = torch.native_dropout(self.down(functional.gelu(self.up(x))), 0.25, True)
        return x + dropped


class Model(nn.Module):
    """how: "plain", or the kind of checkpointing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x).square().mean()


def started(how: str, home: str, where: str = "sim", *, keep: bool = True, **more) -> zeroxide.Engine:
    torch.manual_seed(0)
    zero = {key: value if key == "stage" else {"device": value} for key, value in HOMES[home].items()}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "activation_checkpointing": {"cpu_checkpointing": keep},
        "zeroxide": {"device": where, "threads": 1, **more.pop("zeroxide", {})},
    }
    return zeroxide.initialize(model=how if isinstance(how, nn.Module) else Model(how), config=config | more)[0]


def data(seed: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed)).to("sim")


def step(engine: zeroxide.Engine, seed: int) -> float:
    torch.manual_seed(seed)
    loss = engine(data(seed))
    engine.backward(loss)
    engine.step()
    return loss.item()


def outcome(how: str, home: str, *, keep: bool, **more) -> tuple[list[float], dict[str, torch.Tensor], dict[str, int]]:
    engine = started(how, home, keep=keep, **more)
    losses = [step(engine, seed) for seed in range(3)]
    weights = {name: value.cpu() for name, value in engine.module_state_dict().items()}
    traffic = engine.device_traffic()
    engine.destroy()
    return losses, weights, traffic


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("how", ["plain", "reentrant", "other"])
def test_the_bits_are_those_without(how, home, prefetch):
    kept, plain = (outcome(how, home, keep=keep, zeroxide={"prefetch": prefetch}) for keep in (True, False))
    assert kept[0] == plain[0]
    assert all(torch.equal(value, plain[1][name]) for name, value in kept[1].items())
    assert (kept[2]["up"], kept[2]["down"]) == (plain[2]["up"], plain[2]["down"])
    assert (plain[2]["activations_up"], plain[2]["activations_down"]) == (0, 0)
    if how != "plain":
        # The input of the first layer and those of the blocks; the head's, which is saved last, stays, and the one
        # before it is still there.
        assert kept[2]["activations_down"] == 3 * (1 + LAYERS) * ROW
        assert kept[2]["activations_up"] == 3 * LAYERS * ROW


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("home", HOMES)
def test_blocks_that_the_engine_computes_again(home, keep):
    """Of three of the blocks what they are given goes down alone. Catches: weights that are not up for a second time,
    random numbers of the device that are not the same."""
    plain = outcome("plain", home, keep=keep)
    again = outcome("plain", home, keep=keep, zeroxide={"recompute": 3})
    assert again[0] == plain[0]
    assert all(torch.equal(value, plain[1][name]) for name, value in again[1].items())
    assert (again[2]["up"], again[2]["down"]) == (plain[2]["up"], plain[2]["down"])
    assert (again[2]["activations_down"] < plain[2]["activations_down"]) is keep


@pytest.mark.parametrize("how", ["reentrant", "other"])
def test_saved_tensors_leave_the_device(how, sim):
    """In forward of a block there are its input and one or two before, instead of all; in backward its own and the one
    that comes, with `prefetch` 0 its own alone. Catches: a tensor that stays, or that is brought too early."""
    seen = {}
    x = torch.randn(64 * BATCH, WIDTH).to("sim")
    for name, keep, ahead in (("all", False, 1), ("kept", True, 1), ("late", True, 0)):
        engine = started(how, "resident", keep=keep, zeroxide={"prefetch": ahead})
        engine.backward(engine(x))
        engine.module.zero_grad()
        gc.collect()
        before = sim.usage().in_use
        sim.reset_peak_memory_stats()
        loss = engine(x)
        forward = sim.usage().peak - before
        between = sim.usage().in_use - before
        backward: list[int] = []

        def note(*_, base=before, into=backward):
            into.append(sim.usage().in_use - base)

        handles = [each.up.register_forward_pre_hook(note) for each in engine.module.blocks]
        engine.backward(loss)
        del loss, handles
        seen[name] = forward, between, backward
        engine.destroy()
    one = 64 * ROW
    # A reentrant checkpoint saves its input when the block has run.
    assert seen["all"][0] - seen["kept"][0] == (LAYERS - (3 if how == "reentrant" else 2)) * one
    # The head's output is saved last, so that its input is all that is left.
    assert seen["all"][1] - seen["kept"][1] == LAYERS * one
    # When a block is computed again: with all, its input and those of the blocks before.
    for name, extra in (("kept", 1), ("late", 0)):
        left = [more - less for more, less in zip(seen["all"][2], seen[name][2], strict=True)]
        number = len(left)
        assert number == LAYERS
        assert left[1:-1] == [(LAYERS - 1 - at - extra) * one for at in range(1, number - 1)], (name, left)


@pytest.mark.parametrize("locked", [True, False])
def test_memory_of_the_host_is_used_again(locked, sim, caplog):
    """Locked or not. Catches: memory that is not given back by a step, by a graph that is dropped, by a forward that
    fails, by an evaluation."""
    if not locked:
        sim.set_register_limit(64 << 10)
    engine = started("other", "transient")
    fresh = started("other", "transient", keep=False)
    pool = engine.parts.activations.pool
    try:
        losses = [step(engine, 0)]
        assert pool.used == 0
        assert pool.nbytes == engine.memory()["activations"]["current"] == 8 * GRAIN
        assert pool.peak == (1 + LAYERS + 1) * ROW
        for _ in range(3):
            engine(data(7))
            handle = engine.module.blocks[3].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine(data(8))
            handle.remove()
            gc.collect()
            with torch.no_grad():
                engine(data(9))
        losses.append(step(engine, 1))
        assert (pool.used, pool.nbytes) == (0, 8 * GRAIN)
        assert losses == [step(fresh, seed) for seed in range(2)]
        said = [each for each in caplog.messages if "of activations cannot be locked" in each]
        assert len(said) == (0 if locked else 1)
    finally:
        sim.set_register_limit(1 << 40)
        engine.destroy()
        fresh.destroy()
    assert pool.nbytes == 0


def test_graphs_that_are_kept_or_wait(sim):
    """Catches: a tensor that comes back once only, that of another forward, memory that a copy still writes."""

    def found(keep: bool) -> list[float]:
        engine = started("other", "resident-3", keep=keep)
        seen = []
        for _ in range(2):
            torch.manual_seed(3)
            first, second, third = (engine(data(seed)) for seed in range(3))
            engine.backward(second, retain_graph=True)
            engine.backward(second)
            del third
            engine.backward(first)
            engine.step()
            seen += [first.item(), second.item(), float(engine.get_global_grad_norm())]
        # A part of a graph: what was sent up ahead is dropped before anybody has asked for it.
        out = engine(data(5))
        torch.autograd.grad(out, engine.module.head(data(6)), allow_unused=True)
        engine.destroy()
        return seen

    assert found(True) == found(False)


def test_a_full_budget_leaves_tensors_on_the_device(caplog, monkeypatch):
    """One line says so, and what fits goes down. Catches: a budget that activations do not count against."""
    monkeypatch.setattr("zeroxide.engine.activations.room_in_budget", lambda limit, expected, taken: 3 * GRAIN - taken)
    engine = started("other", "transient")
    fresh = started("other", "transient", keep=False)
    assert [step(engine, seed) for seed in range(2)] == [step(fresh, seed) for seed in range(2)]
    assert engine.parts.activations.pool.nbytes == 3 * GRAIN
    assert engine.device_traffic()["activations_down"] == 2 * 3 * ROW
    said = [each for each in caplog.messages if "zeroxide.host_memory has no room for more" in each]
    assert len(said) == 1
    engine.destroy()
    fresh.destroy()


def test_a_budget_holds(caplog, monkeypatch):
    """What is taken fits beside what is planned. Here the device's memory and its operators' are the process's, too, so
    that what is resident says nothing. Catches: slabs that are taken all the same."""
    monkeypatch.setattr(host_pool, "SLAB", 1 << 20)
    engine = started("plain", "transient")
    step(engine, 0)
    engine.destroy()
    limit = int(1.025 * zeroxide._core.resident()["rss"]) + (256 << 20)
    engine = started("plain", "transient", zeroxide={"host_memory": limit})
    expected = engine.plan().resident_before + engine.plan().expected_peaks()["total"]
    engine.backward(engine(torch.randn(1024 * BATCH, WIDTH, device="sim")))
    pool = engine.parts.activations.pool
    assert 0 < pool.nbytes < limit - expected
    assert any("zeroxide.host_memory has no room for more" in each for each in caplog.messages)
    engine.destroy()


def test_a_change_in_place_is_refused():
    """Before a tensor has gone down, and after. Catches: a version that is not looked at, or that ends with memory."""

    class Changes(nn.Module):
        def __init__(self, later: int) -> None:
            super().__init__()
            self.linear, self.later = nn.Linear(WIDTH, WIDTH), later

        def forward(self, x):
            hidden = self.linear(x).tanh()
            out = (hidden * x).tanh()
            for _ in range(self.later):
                out = (out * 2).tanh()
            torch.accelerator.synchronize()
            hidden.add_(1)
            return out.sum()

    for later in (0, 3):
        engine = started(Changes(later), "resident")
        loss = engine(data(0))
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*\(64, 16\)"):
            engine.backward(loss)
        engine.destroy()


def test_what_is_shared_goes_once_and_what_is_not_the_engines_stays():
    """Views of one storage, saved with and without a change in between; buffers; hooks of the caller's. Catches: a copy
    for each view, down or up, bytes of before the change, a buffer that is copied, a caller that sees nothing."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 3 * WIDTH)
            self.register_buffer("table", torch.ones(BATCH, WIDTH))

        def forward(self, x):
            a, b, c = self.linear(x).split(WIDTH, dim=1)
            out = (a * b).tanh() * (b * c) * self.table
            scale = torch.full_like(x, 2.0)
            self.unused = out * scale
            out = out.tanh().tanh().tanh()
            scale.add_(1)
            return (out * scale).sum()

    def found(keep: bool) -> tuple[float, float, float, dict[str, int]]:
        torch.manual_seed(0)
        engine = started(Shares(), "resident", keep=keep)
        loss = step(engine, 0)
        first = float(engine.get_global_grad_norm())
        moved = engine.device_traffic()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: seen.append(each.shape) or each.detach(), lambda x: x
        ):
            out = engine(data(1))
        assert (BATCH, WIDTH) in seen
        engine.backward(out)
        assert engine.device_traffic()["activations_down"] == moved["activations_down"]
        engine.step()
        norm = float(engine.get_global_grad_norm())
        engine.destroy()
        return loss, first, norm, moved

    (*kept, moved), (*plain, _) = found(True), found(False)
    assert kept == plain
    # x; what the three are views of, three grains; tanh and b * c; scale, and three times tanh. Scale as it is then is
    # last.
    assert moved["activations_down"] == (1 + 3 + 2 + 1 + 3) * ROW
    # The last tanh is there still, and each of the others comes once.
    assert moved["activations_up"] == (1 + 3 + 2 + 1 + 2) * ROW


def test_a_device_that_is_full_when_a_tensor_is_brought_ahead(sim, monkeypatch):
    """It comes when it is asked for. Catches: a backward that fails though it has room for what it needs."""
    ahead, refused = saved_activations.SavedActivations._bring_ahead, []

    def full(self, serial: int) -> None:
        sim.set_memory_limit(sim.usage().in_use)
        before = self._transfers.stowed_up
        ahead(self, serial)
        refused.append(self._transfers.stowed_up == before)
        sim.set_memory_limit(32 << 30)

    monkeypatch.setattr(saved_activations.SavedActivations, "_bring_ahead", full)
    try:
        kept = outcome("other", "resident", keep=True)
    finally:
        sim.set_memory_limit(32 << 30)
    assert refused
    assert all(refused)
    assert kept[0] == outcome("other", "resident", keep=False)[0]


def test_a_tensor_that_another_stream_has_brought_is_not_given_out_while_it_is_used(sim):
    """The head computes on a stream of its own, whose backward brings the last block's tensors ahead, in memory of that
    stream, to which it goes back when the block is done with it. Catches: memory that nobody has been told the other
    stream of."""
    other = torch.Stream("sim")

    class Streams(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            main = torch.sim.current_stream()
            other.wait_stream(main)
            with other:
                out = self.head(x.tanh().tanh()).square().mean()
            main.wait_stream(other)
            return out

    engine = started(Streams("plain"), "resident", zeroxide={"prefetch": 3})
    for seed in range(2):
        # No gradient comes down, for which the host would wait.
        x = data(seed).requires_grad_()
        torch.autograd.grad(engine(x), x)
        with other:
            # All sizes that are given back.
            for size in (ROW, 4 * ROW) * 8:
                torch.empty(size, dtype=torch.uint8, device="sim").fill_(1)
        torch.accelerator.synchronize()
    engine.destroy()


def test_autocast():
    more = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    kept, plain = (outcome("other", "resident", keep=keep, **more) for keep in (True, False))
    assert kept[0] == plain[0]
    assert kept[2]["activations_down"] > 0


def test_a_graph_that_outlives_the_engine_is_refused():
    engine = started("plain", "resident")
    out = engine.module(data(0))
    hidden = out.grad_fn
    engine.destroy()
    with pytest.raises(ModelError, match="after the engine was destroyed"):
        out.backward()
    del out, hidden
    gc.collect()


def test_in_host_memory_the_key_has_no_effect(caplog):
    engine = started("plain", "resident", "cpu")
    assert "config key activation_checkpointing.cpu_checkpointing has no effect: the model computes in host memory" in (
        caplog.messages
    )
    assert "activations" not in engine.memory()
    assert set(engine.device_traffic().values()) == {0}
    engine.destroy()


class Noted:
    """A stream whose waits are noted by where in the engine they are made."""

    def __init__(self, stream: torch.Stream, notes: dict[tuple[str, int], list[int]]) -> None:
        self.stream, self.notes = stream, notes

    def wait_event(self, event: torch.Event) -> None:
        frame = sys._getframe(1)
        self.notes.setdefault((frame.f_code.co_name, frame.f_lineno), []).append(torch.sim.waits())
        self.stream.wait_event(event)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Noted) and self.stream == other.stream

    def __enter__(self) -> None:
        self.stream.__enter__()

    def __exit__(self, *error: object) -> None:
        self.stream.__exit__(*error)


def test_each_wait_is_missed(sim, monkeypatch):
    """Of every place where copies of activations wait, or are waited for: without its waits there are races."""
    record = torch.Tensor.record_stream
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: record(self, stream.stream))

    def program(forgotten: Collection[int]) -> tuple[dict[tuple[str, int], list[int]], bool]:
        notes: dict[tuple[str, int], list[int]] = {}
        engine = started("other", "resident", zeroxide={"prefetch": 3})
        copies = engine.parts.transfers
        current = copies.stream
        with monkeypatch.context() as patch:
            patch.setattr(copies, "stream", lambda: Noted(current(), notes))
            patch.setattr(copies, "_up", Noted(copies._up, notes))
            patch.setattr(copies, "_down", Noted(copies._down, notes))
            sim.reset()
            for each in forgotten:
                sim.forget_wait(each)
            step(engine, 0)
            x = data(1)
            for _ in range(3):
                # Graphs that are dropped: at once, and with a tensor on its way up.
                engine(x)
                hidden = []
                handle = engine.module.blocks[-1].register_forward_hook(
                    lambda _m, _a, out, seen=hidden: seen.append(out)
                )
                out = engine(x)
                handle.remove()
                torch.autograd.grad(out, hidden, retain_graph=True)
                del out, hidden
            # Two streams: memory of the host that one has left, and tensors of one that the other's backward brings.
            first, second = torch.sim.current_stream(), torch.Stream("sim")
            x.requires_grad_()
            second.wait_event(first.record_event())
            torch.autograd.grad(engine(x), x)
            with second:
                engine(x)
            loss = engine(x)
            with second:
                torch.autograd.grad(engine.module.head(x).sum(), x)
            engine.backward(loss)
            torch.accelerator.synchronize()
            raced = bool(sim.races())
            sim.reset()
        engine.destroy()
        sim.reset()
        return notes, raced

    notes, raced = program(())
    assert not raced
    places = {place: numbers for place, numbers in notes.items() if place[0] in PLACES}
    assert {name: sum(name == each for each, _ in places) for name in PLACES} == PLACES
    assert {place: program(numbers)[1] for place, numbers in places.items()} == dict.fromkeys(places, True)

"""The model of a step in `benches/timeline`: its record is what the engine does, and its times are the device's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

from timeline import engine_order, llama
from timeline.deepspeed_order import Order, Settings
from timeline.model import COMPUTE, Copy, Event, Host, Mark, Rates, Wait, Work, last_step, replay
from timeline.pacing import check

pytestmark = pytest.mark.usefixtures("sim")

LAYERS = 4
OFFLOADED = {"stage": 3, "offload_param": {"device": "cpu"}}


@pytest.fixture(scope="module")
def costs() -> llama.Costs:
    return llama.Costs(llama.shapes(LAYERS))


def copied(record, way: str) -> float:
    return sum(each.nbytes for each in record if isinstance(each, Copy) and each.way == way)


def computed(record) -> float:
    return sum(each.flop for each in record if isinstance(each, Work))


def needed(costs: llama.Costs) -> float:
    """Of a step: forward, the layers' again, and twice forward for backward."""
    layers = [name for name in costs.shapes if "layers." in name]
    return 3 * sum(map(costs.forward, costs.shapes)) + sum(map(costs.forward, layers))


def test_a_record_ends_when_its_parts_do():
    rates = Rates(flops=1.0, link=1.0, host_memory=1.0)
    record = [
        Work(COMPUTE, 2.0),
        Event(COMPUTE, 1),
        Wait("down", 1),
        Copy("down", "down", 3.0),
        Event("down", 2),
        Work(COMPUTE, 1.0),
        Wait(None, 2),
        Host(nbytes=4.0),
        Mark(),
        Copy("up", "up", 5.0),
        Event("up", 3),
        Wait(COMPUTE, 3),
        Work(COMPUTE, 1.0),
        Event(COMPUTE, 4),
        Wait(None, 4),
        Mark(),
    ]
    # The copy down is from 2 to 5, the host busy until 9, the copy up over at 14.
    found = replay(record, rates)
    assert found.marks == [9.0, 15.0]
    assert found.busy == [(0.0, 2.0), (2.0, 3.0), (14.0, 15.0)]
    assert found.exposed(0.0, 9.0) == 6.0
    split = last_step(record, rates)
    assert (split.step, split.compute, split.for_host, split.for_copies) == (6.0, 1.0, 0.0, 5.0)


@pytest.mark.parametrize("zero", [OFFLOADED, {"stage": 3}, {"stage": 2}], ids=["offloaded", "resident", "shown"])
def test_a_record_of_the_engine_has_every_product_and_byte(zero, costs):
    record = engine_order.record(zero, 1, layers=LAYERS).record
    assert computed(record) == pytest.approx(needed(costs))
    assert copied(record, "down") == 2 * costs.total
    layer = sum(costs.numel(name) for name in costs.shapes if "layers.0." in name)
    # Layers go up for forward and for backward, the last one once for both.
    again = layer * (LAYERS - 1) if zero is OFFLOADED else 0
    assert copied(record, "up") == 2 * (costs.total + again)
    assert sum(each.nbytes for each in record if isinstance(each, Host) and each.what == "update") == 26 * costs.total


@pytest.mark.parametrize(
    ("settings", "down", "up"),
    [
        (Settings(2, weights_on_device=True, overlap=False), 4, 2),
        (Settings(2, weights_on_device=True, overlap=True), 4, 2),
        (Settings(3, weights_on_device=True, overlap=True), 6, 4),
    ],
)
def test_deepspeeds_order_has_every_product_and_byte(settings, down, up, costs):
    record = Order(costs, settings).steps(1)
    assert computed(record) == pytest.approx(needed(costs))
    # Vectors go with the rest in the update, and are left out before it.
    assert copied(record, "down") == pytest.approx(down * costs.total, rel=1e-3)
    assert copied(record, "up") == pytest.approx(up * costs.total, rel=1e-3)


def test_deepspeed_keeps_what_is_used_again_soon(costs):
    """Of 12 layers it keeps what its backward begins with: the head and layers of 1e9 elements in all, passed twice."""
    costs = llama.Costs(llama.shapes(12))
    record = Order(costs, Settings(3, weights_on_device=False, overlap=True)).steps(1)
    fetched = (copied(record, "up") - 2 * costs.total) / 2
    layer = sum(costs.numel(name) for name in costs.shapes if "layers.0." in name)
    again = fetched - costs.total
    assert 7 * layer <= again <= 11 * layer


RATES = Rates(flops=165.2e12, link=31.5e9, host_memory=204.8e9)
"""Of `benches/modelled_step.py`, where their sources are."""
BESIDE = {
    "offloaded": (
        OFFLOADED,
        [Settings(3, False, True), Settings(3, False, True, bucket=4096**2, prefetch=0.9 * 4096**2)],
    ),
    "resident": ({"stage": 3}, [Settings(2, True, False), Settings(2, True, True), Settings(3, True, True)]),
    "shown": ({"stage": 2}, [Settings(2, True, False), Settings(2, True, True), Settings(3, True, True)]),
}
"""Settings of both sides that have weights at the same home."""


@pytest.mark.parametrize("name", BESIDE)
def test_copies_are_hidden_four_times_as_well_as_deepspeeds(name, costs):
    """Catches: gradients that backward waits for, weights that go up when all have been updated, a gradient that the
    device waits for because it is large."""
    zero, theirs = BESIDE[name]
    ours = last_step(engine_order.record(zero, 2, layers=LAYERS).record, RATES)
    least = min((last_step(Order(costs, each).steps(2), RATES) for each in theirs), key=lambda split: split.for_copies)
    assert ours.for_copies <= 0.25 * least.for_copies
    assert ours.for_host <= least.for_host


def test_more_micro_batches_do_not_stop_the_device(costs):
    """Those after the first pass through blocks: enough of them that the next layer's work is there in time. Waited for
    are the gradients of head and embedding, of which half fits the blocks, and that the host adds them."""
    one, three = (
        last_step(engine_order.record({"stage": 3}, 2, layers=LAYERS, micro_batches=each).record, RATES)
        for each in (1, 3)
    )
    large = 2 * 2 * costs.numel("model.embed_tokens.weight")
    assert three.exposed - one.exposed <= 2 * large * (1 / RATES.link + 6 / 2 / RATES.host_memory)


@pytest.mark.parametrize(("delay", "micro_batches"), [(0.1, 1), (0.02, 2)])
def test_the_model_ends_when_the_simulated_device_does(delay, micro_batches):
    """A copy sleeps at least its time, so that the device is later, by what waking up takes: 60 to 200 microseconds on
    an idle machine, of 20,000 or more, and some times that on a busy one. The host's own time, taken from another run,
    is 0.02 of the copies'."""
    found = check(delay, micro_batches)
    assert found["same_order"]
    assert found["copies"] > 20
    assert 0.85 <= found["ratio"] <= 1.02

"""Units on a device, as the core knows them: their books, and not a byte."""

from __future__ import annotations

import pytest
import torch

from zeroxide import _core
from zeroxide.device.placement import spec
from zeroxide.errors import CoreError
from zeroxide.kernels import norm

ADAM = _core.RULES["adam"](**_core.RULES["adam"].hyperparameters)


STREAMS = [11, 2**64 - 1, 0]


def made_in(format: str) -> _core.Offload:
    """A core with a unit here and one on a device, of parameters with random bits of their own."""
    units = [
        _core.UnitSpec(
            name=name,
            params=[(100, True), (64, True), (5, False)],
            weights=_core.WeightHome.HOST,
            state=state,
            optimizer=ADAM,
            format=format,
            streams=STREAMS,
        )
        for name, state in (("here", _core.StateHome.HOST), ("away", _core.StateHome.DEVICE))
    ]
    settings = _core.Settings(
        limit=None, threads=1, compute="bf16", grad="bf16", tile_elements=_core.DEFAULT_TILE_ELEMENTS, staging_bytes=0,
        gathered_bytes=0, engine=_core.IoEngine.AUTO, queue_depth=4, directories=[], job="away",
    )  # fmt: skip
    return _core.Offload(settings, units)


@pytest.fixture
def core():
    made = made_in("split")
    yield made
    made.close()


def test_no_byte_of_it_is_reserved_and_what_is_asked_of_bytes_is_refused_by_name(core):
    """Catches: a call that reads an empty window, memory that is reserved all the same."""
    used = core.usage()
    assert used["optimizer"][0] == 2048 * 10
    assert used["gradients"][0] == 2048 * 2
    values, raw = torch.ones(100), torch.zeros(2, dtype=torch.uint8)
    for call in (
        lambda: core.gather(1),
        lambda: core.fill_begin(1, "weights"),
        lambda: core.read_param(1, 0, "weights", 0, spec(values)),
        lambda: core.read_param(1, 0, "grad", 0, spec(values)),
        lambda: core.write_param(1, 0, "exp_avg", 0, spec(values)),
        lambda: core.write_param(1, 0, "grad", 0, spec(values)),
        lambda: core.read_bytes(1, 2, 0, spec(raw)),
        lambda: core.write_bytes(1, 2, 0, spec(raw)),
        lambda: core.accumulate(1, 0, 0, spec(values), True),
        lambda: core.rewrite_weights(1),
    ):
        with pytest.raises(CoreError, match="unit away is at home on the device"):
            call()
    with pytest.raises(CoreError, match="unit here is at home in the core"):
        core.note_gradient(0, 0)
    with pytest.raises(CoreError, match="frozen"):
        core.note_gradient(1, 2)


def test_its_books_are_kept_with_those_of_the_others(core):
    """Catches: a norm without it, updates that are not counted, gradients that outlive a step."""
    core.fill_begin(0, "weights")
    core.fill_commit(0)
    core.accumulate(0, 0, 0, spec(torch.full((100,), 2.0)), True)
    assert not core.note_gradient(1, 1)
    assert core.note_gradient(1, 1)
    core.note_norm(1, 1, 11.0, False)
    assert core.grad_norm() == (411.0, False, 2)
    assert bytes(core.accumulated()) == bytes([1, 0, 0, 1])
    assert core.away_runs(1, [ADAM]) == [(128, 64, 0, 0, STREAMS[1])]
    core.note_gradient(1, 0)
    # The padding between two parameters of equal constants joins their run.
    assert core.away_runs(1, [ADAM]) == [(0, 192, 0, 0, STREAMS[0])]
    core.step([ADAM], 1.0)
    assert [core.updates(1, at) for at in (0, 1)] == [1, 1]
    assert core.grad_norm() == (0.0, False, 0)
    assert core.away_runs(1, [ADAM]) == []


def test_a_gradient_that_comes_in_parts_has_the_norm_of_one_that_comes_whole():
    """The order of sums is that of the kernel's reference in torch. Catches: sums of parts that are added up in another
    order than the pieces of the whole."""
    numel, part = 8 * norm.PIECE, 4 * norm.PIECE
    unit = _core.UnitSpec(
        name="large", params=[(numel, True)], weights=_core.WeightHome.HOST, state=_core.StateHome.HOST,
        optimizer=ADAM, format="fp32",
    )  # fmt: skip
    settings = _core.Settings(
        limit=None, threads=2, compute="f32", grad="f32", tile_elements=_core.DEFAULT_TILE_ELEMENTS, staging_bytes=0,
        gathered_bytes=0, engine=_core.IoEngine.AUTO, queue_depth=4, directories=[], job="parts",
    )  # fmt: skip
    core = _core.Offload(settings, [unit])
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(7))
    expected = norm.reference([grad]).sum_squares.item()
    core.accumulate(0, 0, 0, spec(grad), True)
    assert core.grad_norm()[0] == expected
    core.clear_gradients()
    for start in range(0, numel, part):
        core.accumulate(0, 0, start, spec(grad[start : start + part].clone()), True)
    assert core.grad_norm()[0] == expected
    first, second = (norm.reference([each]).sum_squares.item() for each in grad.split(part))
    assert first + second != expected, "the order makes no difference here"
    core.close()


@pytest.mark.parametrize("format", ["split-bf16", "compact"])
def test_a_format_that_rounds_updates_each_parameter_by_its_own_random_bits(format):
    """Catches: parameters that share a run, and with it the bits of the first of them."""
    core = made_in(format)
    core.note_gradient(1, 0)
    core.note_gradient(1, 1)
    assert core.away_runs(1, [ADAM]) == [(0, 100, 0, 0, STREAMS[0]), (128, 64, 0, 0, STREAMS[1])]
    core.close()

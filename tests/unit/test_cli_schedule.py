import itertools

import pytest

from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.schedule import fraction_of_peak


def curve(**changes):
    options = TrainOptions(**{"steps": 100, "warmup": 9, **changes}).checked()
    return [fraction_of_peak(step, options) for step in range(options.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_the_first_step_to_the_peak(schedule):
    values = curve(schedule=schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == 1.0
    assert curve(schedule=schedule, warmup=0)[0] == 1.0


def test_decay_ends_at_a_tenth():
    for schedule in ("cosine", "linear"):
        falling = curve(schedule=schedule)[9:]
        assert all(later < earlier for earlier, later in itertools.pairwise(falling))
        assert 0.1 < falling[-1] < 0.12
    cosine, linear = curve(schedule="cosine"), curve(schedule="linear")
    # Half way down both are half way down; before that the cosine is above the line.
    middle = 9 + 91 // 2
    assert cosine[middle] == pytest.approx(0.55, abs=0.02)
    assert linear[middle] == pytest.approx(0.55, abs=0.02)
    assert cosine[30] > linear[30] + 0.05


def test_constant_stays():
    assert set(curve(schedule="constant")[9:]) == {1.0}


def test_one_step_trains_at_the_peak():
    assert curve(steps=1, warmup=None) == [1.0]

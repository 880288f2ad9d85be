"""The loss scaler as a state machine, against a model of DeepSpeed's rules written another way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroxide.config import LossScale
from zeroxide.errors import NumericsError
from zeroxide.precision.loss_scale import LossScaler

OVERFLOW, GOOD = True, False


@dataclass
class Rules:
    """The scale as a function of the whole history, which is kept: nothing is counted from step to step."""

    settings: LossScale
    history: list[bool] = field(default_factory=list)

    def scale(self) -> float:
        """The exponent moves by one a step: replayed from the start, each rule looked up in the past."""
        rules, scale = self.settings, self.settings.initial
        refilled = 0  # the step from which overflows have counted against hysteresis
        for now, overflow in enumerate(self.history):
            past = self.history[: now + 1]
            if overflow:
                if rules.consecutive_hysteresis:
                    # All steps back to the last good one, as far as the last doubling, which a good step did.
                    used = next((n for n, each in enumerate(reversed(past)) if not each), len(past))
                else:
                    used = sum(past[refilled:])
                if used >= rules.hysteresis:
                    scale = max(scale / 2, rules.minimum)
            else:
                # The first good step of a run, and after an overflow, is not counted.
                good = next((n for n, each in enumerate(reversed(past)) if each), len(past)) - 1
                if good and good % rules.window == 0:
                    scale *= 2
                    refilled = now + 1
        return scale


SETTINGS = st.builds(
    LossScale,
    initial=st.sampled_from([1.0, 2.0**4, 2.0**16]),
    window=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
    consecutive_hysteresis=st.booleans(),
    minimum=st.sampled_from([0.25, 1.0, 0.75]),
)


@given(SETTINGS, st.lists(st.booleans(), max_size=60), st.integers(0, 60))
@settings(deadline=None, max_examples=400)
def test_any_history_gives_the_scale_of_the_rules(chosen, history, interrupted):
    """Interrupted anywhere, saved as JSON and resumed by another scaler, which must not matter."""
    scaler, rules = LossScaler(chosen), Rules(chosen)
    for number, overflow in enumerate(history):
        if number == interrupted:
            state = json.loads(json.dumps(scaler.state_dict()))
            scaler = LossScaler(chosen)
            scaler.load_state_dict(state)
        before = rules.scale()
        rules.history.append(overflow)
        try:
            scaler.update(overflow)
        except NumericsError:
            # Refused exactly where a scale at the minimum would have been halved.
            assert before == chosen.minimum
            assert overflow
            assert rules.scale() == before
            return
        assert scaler.scale == rules.scale()


def scales(chosen: LossScale, history: list[bool]) -> list[float]:
    scaler, found = LossScaler(chosen), []
    for overflow in history:
        scaler.update(overflow)
        found.append(scaler.scale)
    return found


def test_the_rules_by_example():
    """As DeepSpeed 0.19.8 has them, worked out by hand: at first and after an overflow a good step is not counted."""
    dynamic = LossScale(initial=16.0, window=3, hysteresis=2)
    assert scales(dynamic, [GOOD] * 8) == [16, 16, 16, 32, 32, 32, 64, 64]
    assert scales(dynamic, [OVERFLOW, OVERFLOW, OVERFLOW]) == [16, 8, 4]
    # A good step does not restore hysteresis, and the window starts anew after every overflow.
    assert scales(dynamic, [OVERFLOW, GOOD, OVERFLOW, GOOD, GOOD, GOOD, GOOD]) == [16, 16, 8, 8, 8, 8, 16]
    # A doubling does.
    assert scales(dynamic, [OVERFLOW, GOOD, GOOD, GOOD, GOOD, OVERFLOW]) == [16, 16, 16, 16, 32, 32]
    patient = LossScale(initial=16.0, window=3, hysteresis=2, consecutive_hysteresis=True)
    assert scales(patient, [OVERFLOW, GOOD, OVERFLOW, OVERFLOW]) == [16, 16, 16, 8]
    assert scales(LossScale(initial=3.0, hysteresis=1, minimum=1.0), [OVERFLOW] * 2) == [1.5, 1.0]


def test_an_overflow_at_the_minimum_ends_the_run_with_one_line():
    scaler = LossScaler(LossScale(initial=2.0, hysteresis=2, minimum=1.0))
    scaler.update(OVERFLOW)
    scaler.update(OVERFLOW)
    assert scaler.scale == 1.0
    with pytest.raises(NumericsError, match=r"smallest loss scale, 1: .*min_loss_scale") as caught:
        scaler.update(OVERFLOW)
    assert "\n" not in str(caught.value)
    assert caught.value.value == 1.0


@pytest.mark.parametrize("chosen", [None, LossScale(initial=100.0, dynamic=False)], ids=["none", "static"])
def test_what_is_not_dynamic_never_moves(chosen):
    scaler = LossScaler(chosen)
    first = scaler.scale
    for overflow in (OVERFLOW, GOOD, OVERFLOW, OVERFLOW):
        scaler.update(overflow)
    assert scaler.scale == first == (1.0 if chosen is None else 100.0)
    assert scaler.state_dict() is None
    scaler.load_state_dict({"scale": 7.0, "hysteresis": 1, "good_steps": 0})
    assert scaler.scale == first


def test_changed_settings_bound_what_is_loaded():
    scaler = LossScaler(LossScale(hysteresis=2, minimum=8.0, window=2))
    scaler.load_state_dict({"scale": 4.0, "hysteresis": 9, "good_steps": 1000})
    assert scaler.scale == 8.0
    scaler.update(GOOD)
    assert scaler.scale == 16.0, "the window is over"
    scaler.update(OVERFLOW)
    scaler.update(OVERFLOW)
    assert scaler.scale == 8.0, "two units of hysteresis, not nine"


def test_the_loss_is_scaled_in_fp32():
    loss = torch.tensor(3.0, dtype=torch.float16, requires_grad=True)
    scaled = LossScaler(LossScale()).apply(loss)
    assert (scaled.dtype, scaled.item()) == (torch.float32, 3.0 * 2**16)
    assert LossScaler(None).apply(loss) is loss


def test_gradients_of_a_loss_that_was_not_scaled_are_noticed():
    scaler = LossScaler(LossScale())
    with pytest.raises(RuntimeError, match=r"engine\.scale\(loss\)"):
        scaler.check_used()
    scaler.apply(torch.ones(()))
    scaler.check_used()
    scaler.update(GOOD)
    with pytest.raises(RuntimeError):
        scaler.check_used()
    LossScaler(None).check_used()
    LossScaler(LossScale(initial=1.0, dynamic=False)).check_used()

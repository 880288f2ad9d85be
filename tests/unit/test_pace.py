"""How long a save in the background rests."""

from __future__ import annotations

import time

import pytest

from zeroxide.checkpoint.save.pace import LEAST_SECONDS, Pace


class Hurry:
    """Notes rests instead of taking them."""

    def __init__(self):
        self.now = False
        self.rests = []

    def is_set(self):
        return self.now

    def wait(self, seconds):
        self.rests.append(round(seconds, 6))


@pytest.fixture
def work(monkeypatch):
    """A function that has the thread work for so many seconds."""
    clock = [100.0]
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    return spend


def test_it_works_a_fifth_of_the_time(work):
    hurry = Hurry()
    pace = Pace(hurry)
    for seconds in (0.01, 0.02, LEAST_SECONDS / 2, LEAST_SECONDS):
        work(seconds)
        pace.rest()
    # The third is too little to rest for, and counts with the fourth.
    assert hurry.rests == [0.04, 0.08, round(4 * 1.5 * LEAST_SECONDS, 6)]


def test_what_was_waited_for_is_not_made_up_for(work):
    """Catches: work that was needed, or done in a hurry, counted for the rest after it: seconds of it, in which the
    other ranks would hear nothing."""
    hurry = Hurry()
    pace = Pace(hurry)
    work(1.0)
    pace.rest(needed=True)
    hurry.now = True
    work(1.0)
    pace.rest()
    hurry.now = False
    assert hurry.rests == []
    work(0.01)
    pace.rest()
    assert hurry.rests == [0.04]

"""The search for a way of training: never over a budget, and never worse with more of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroxide.cli.planning.estimate import Estimate, Phases
from zeroxide.cli.planning.request import OnPaper, Option, Request
from zeroxide.cli.planning.search import fastest, fewest_blocks, largest_batch, nearest, options, recommended

MIB = 1 << 20


def made(process: int, seconds: float, written: int = 0, *, exact: bool = True, name: str = "cpu") -> Estimate:
    return Estimate(
        option=Option(name, "split"),
        exact=exact,
        buckets={"weights": process},
        activations=0,
        process=process,
        device=0,
        disk_bytes=written,
        read=written,
        written=written,
        phases=Phases(seconds, 0.0, 0.0, 0.0),
    )


def within(each: Estimate, host: int, disk: int) -> Estimate:
    """The estimate, with what does not fit."""
    need = {"host": (each.process, host), "disk": (each.disk_bytes, disk)}
    over = {name: size for name, (size, limit) in need.items() if size > limit}
    return dataclasses.replace(each, over=over, problems=tuple(over))


ESTIMATES = st.lists(
    st.builds(
        made,
        st.integers(1, 100),
        st.floats(0.01, 100),
        st.integers(0, 100),
        exact=st.booleans(),
        name=st.sampled_from(["cpu", "mixed", "nvme"]),
    ),
    max_size=12,
)


def rank(found: Estimate | None) -> tuple[bool, bool, float]:
    """Nothing is worst, lossy formats are worse than exact ones, then time."""
    return (True, True, 0.0) if found is None else (False, not found.exact, found.phases.total)


@given(ESTIMATES, st.integers(0, 100), st.integers(0, 100))
def test_what_is_recommended_keeps_every_budget(estimates, host, disk):
    found = recommended([within(each, host, disk) for each in estimates])
    fitting = [each for each in estimates if each.process <= host and each.disk_bytes <= disk]
    assert (found is None) == (not fitting)
    assert found is None or (found.process <= host and found.disk_bytes <= disk)


@given(ESTIMATES, st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_more_memory_and_disk_are_never_worse(estimates, host, more_host, disk, more_disk):
    before = rank(recommended([within(each, host, disk) for each in estimates]))
    after = rank(recommended([within(each, host + more_host, disk + more_disk) for each in estimates]))
    assert after[:2] <= before[:2]
    # Times that differ by less than 5 % count as the same.
    assert after[:2] < before[:2] or after[2] <= 1.05 * before[2]


def test_of_two_alike_the_one_that_wears_less_is_taken():
    slow, wearing, gentle = made(1, 3.0), made(1, 1.01, 50), made(2, 1.015, 5)
    assert recommended([slow, wearing, gentle]) is gentle


@given(ESTIMATES, st.integers(0, 100), st.integers(0, 100))
def test_the_nearest_budget_is_enough_and_the_smallest(estimates, host, disk):
    worked = [within(each, host, disk) for each in estimates]
    least = nearest(worked)
    if least is None:
        return
    assert least.process > host
    again = [within(each, least.process, disk) for each in estimates]
    assert any(each.process == least.process and each.fits for each in again)
    others = [each for each in worked if set(each.over) == {"host"} and each.exact == least.exact]
    assert all(least.process <= each.process for each in others)


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(2, 64), st.integers(1, 8).map(lambda count: 64 * count))
def test_the_largest_batch_fits_and_one_more_does_not(limit, batch, sequence):
    asked = Request("m", batch, sequence)

    def work_out(request: Request):
        return [within(made(10 + request.batch * request.sequence // 16, 1.0), limit, 0)]

    def fits(batch: int, sequence: int) -> bool:
        return 10 + batch * sequence // 16 <= limit

    if fits(batch, sequence):
        return
    found = largest_batch(asked, work_out)
    if found is None:
        assert not fits(1, 64)
        return
    _, most, longest = found
    assert fits(most, longest)
    if longest == sequence:
        assert most < batch
        assert not fits(most + 1, sequence)
    else:
        assert most == 1
        assert not fits(1, sequence)
        assert not fits(1, longest + 64)


@pytest.mark.parametrize(
    ("request_", "offloads"),
    [
        (Request("m", 1, 8), {"cpu"}),
        (Request("m", 1, 8, disk=Path("/")), {"cpu", "mixed", "nvme"}),
        (Request("m", 1, 8, device=OnPaper(MIB, 1.0, 1.0)), {"none", "cpu"}),
        (Request("m", 1, 8, disk=Path("/"), device=OnPaper(MIB, 1.0, 1.0)), {"none", "cpu", "mixed", "nvme"}),
    ],
)
def test_options_are_those_that_differ(request_, offloads):
    early = {"nvme": (False, True)}
    found = options(request_, ["fp32", "split"], blocks=3, early=lambda offload: early.get(offload, (False,)))
    assert {each.offload for each in found} == offloads
    assert len(set(found)) == len(found) == 2 * 2 * (len(offloads) + ("nvme" in offloads))
    assert {each.recompute for each in found} == {0, 3}
    assert {each.offload for each in found if each.early} == offloads & {"nvme"}
    assert not any(each.recompute for each in options(request_, ["fp32"], blocks=0, early=lambda _: (False,)))


@given(st.integers(1, 40), st.floats(0.1, 9), st.lists(st.floats(0, 20), min_size=1, max_size=3))
def test_the_fastest_of_falling_and_rising_seconds_is_found(count, each, waits):
    """What is recomputed costs as much each; what waits falls to nothing at its own rate. Catches: the wrong half."""

    def seconds(blocks: int) -> float:
        return each * blocks + sum(max(0.0, wait * (count - blocks) - 3) for wait in waits)

    found = fastest(count, seconds)
    assert seconds(found) == pytest.approx(min(map(seconds, range(count + 1))))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.data())
def test_the_fewest_blocks_are_found(freed, data):
    """Each block frees what it frees. Catches: one block too many, or too few."""
    count, most = len(freed), sum(freed)
    if not most:
        return
    short = data.draw(st.integers(1, most))

    def lacks(blocks: int) -> int:
        return short - sum(freed[:blocks])

    found = fewest_blocks(count, lacks)
    assert lacks(found) <= 0 < lacks(found - 1)


def test_of_blocks_that_are_alike_few_are_tried():
    """None, all, those that the line says, and one less. Catches: a rehearsal for each of them."""
    for short in (1, 2300, 4799):
        tried = []

        def lacks(blocks: int, short: int = short, tried: list[int] = tried) -> int:
            tried.append(blocks)
            return short - 100 * blocks

        assert fewest_blocks(48, lacks) == -(-short // 100)
        assert len(tried) <= 4

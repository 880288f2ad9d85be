"""ZeRO++: weights as int8 and gradients as int4 between real ranks, two groups of two, over gloo.

That codes and scales are right is shown by `tests/unit/test_messages.py` and `crates/zeroxide-optim/tests/blocks.rs`,
and what the plan counts by `crates/zeroxide-plan/tests/quantised.rs`; here is what ranks do with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

PROGRAM = Path(__file__).with_name("quantised_ranks.py")
WORLD, NEAR = 4, 2
FAR = WORLD // NEAR
Case = dict[str, Any]
Found = dict[str, list[dict[str, Any]]]

HPZ = {"zero_hpz_partition_size": NEAR}
INT8, INT4 = {"zero_quantized_weights": True}, {"zero_quantized_gradients": True}
LOCO = {"zeropp_loco_param": {"err_beta": 0.8, "reset_T": 1024}}


def run(cases: list[Case], folder: Path, world: int = WORLD) -> Found:
    """What every rank has found, by the names of the cases."""
    given = folder / "cases.json"
    given.write_text(json.dumps(cases))
    results = run_ranks(world, PROGRAM, [str(given)], timeout=240)
    assert [result.code for result in results] == [0] * world, "\n".join(result.err[-3000:] for result in results)
    found: Found = {}
    for result in results:
        for line in result.out.splitlines():
            if line.startswith("FOUND "):
                row = json.loads(line.removeprefix("FOUND "))
                found.setdefault(row["name"], []).append(row)
    assert [len(rows) for rows in found.values()] == [world] * len(cases)
    return found


SMALL = {"width": 96, "blocks": 3, "prefetch": 1}
TRAINED: list[Case] = [
    {"name": "exact", "zero": {}, "prefetch": 0},
    {"name": "zero++", "zero": {**HPZ, **INT8, **INT4, **LOCO}, "prefetch": 0, "edited": True, "meant": True},
    {"name": "again", "zero": {**HPZ, **INT8, **INT4, **LOCO}, "prefetch": 0, "edited": True},
    {"name": "exact, small", "zero": {}, **SMALL},
    {"name": "exact, two micro-batches", "zero": {}, **SMALL, "micro_batches": 2},
    {"name": "int8", "zero": INT8, **SMALL, "meant": True, "micro_batches": 2},
    {"name": "int8, fp32", "zero": INT8, **SMALL, "meant": True, "dtype": "float32"},
    {"name": "int8 in a group", "zero": {**HPZ, **INT8}, **SMALL, "micro_batches": 2},
    {"name": "int8, shard groups", "zero": INT8, "mesh": {"dp_shard": NEAR}, **SMALL, "meant": True},
    {"name": "int4", "zero": INT4, **SMALL},
    {"name": "int4, shard groups", "zero": {**HPZ, **INT4}, **SMALL, "micro_batches": 2},
    {"name": "both, shard groups", "zero": {**INT8, **INT4, **LOCO}, "mesh": {"dp_shard": NEAR}, **SMALL},
    {"name": "frozen", "zero": {"zero_quantized_nontrainable_weights": True}, **SMALL, "frozen": 1, "meant": True},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Found:
    return run(TRAINED, tmp_path_factory.mktemp("trained"))


WAYS = {"flat": INT4, "two hops": {**HPZ, **INT8, **INT4}, "shard groups": {**HPZ, **INT4}}
FED: list[Case] = [
    {"act": "feed", "name": f"{kind} {way} {with_}", "kind": kind, "zero": {**WAYS[way], **more}, "steps": steps}
    for kind, way in (("steady", "flat"), ("steady", "shard groups"), ("pairs", "two hops"))
    for with_, more, steps in (("without", {}, 8), ("with", LOCO, 40))
]
LEARNING = [
    {"act": "learn", "name": name, "zero": zero, "steps": 24}
    for name, zero in (("learns exactly", {}), ("learns", {**HPZ, **INT8, **INT4, **LOCO}))
]
GATHERED: list[Case] = [
    {"act": "learn", "name": f"{family} {way}", "family": family, "steps": 3, **zero}
    for family in ("gpt-reentrant", "block-lists")
    for way, zero in (
        ("over all", {"zero": INT8}),
        ("in groups", {"zero": {**INT8, **HPZ}}),
        ("in shard groups", {"zero": INT8, "mesh": {"dp_shard": NEAR}}),
    )
]
SCALED: list[Case] = [
    {
        "act": "overflow",
        "name": f"fp16 {name}",
        "zero": {**zero, **INT4, **LOCO},
        "clip": 0,
        "more": {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 1}},
    }
    for name, zero in (("flat", {}), ("two hops", {**HPZ, **INT8}))
]
RESUMED: Case = {"act": "resume", "name": "resume", "zero": {**HPZ, **INT8, **INT4, **LOCO}, **SMALL}


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Found:
    return run([*FED, *LEARNING, *GATHERED, *SCALED, RESUMED], tmp_path_factory.mktemp("others"))


def test_every_rank_computes_with_the_same_weights(trained):
    """Catches: a rank that computes with its own exact part, codes of old weights after a step, a part at another's
    place, and a backward that gathers something else than forward."""
    for case in TRAINED:
        rows = trained[case["name"]]
        used = rows[0]["used"]
        assert used, case["name"]
        assert all(row["used"] == used for row in rows), case["name"]
        blocks, passes = case.get("blocks", 4), case.get("micro_batches", 1)
        steps = [used[start : start + blocks] for start in range(0, len(used), blocks)]
        assert len(steps) == 3 * passes
        # Of frozen blocks at the front nothing goes back.
        frozen = case.get("frozen", 0)
        expected = [each for forward in steps for each in reversed(forward[frozen:])]
        assert all(row["back"] == expected for row in rows), case["name"]
        for first in range(0, len(steps), passes):
            assert steps[first : first + passes] == [steps[first]] * passes, "a step's micro-batches use the same"
        trainable = slice(case.get("frozen", 0), None)
        firsts = [each[trainable] for each in steps[::passes]]
        assert len({*map(tuple, firsts)}) == len(firsts), "a step changes weights"


def test_what_is_computed_with_is_what_the_codes_stand_for(trained):
    """By torch's answer to the same. Catches: weights that were quantised twice, in other blocks, or not at all, and
    codes of weights that have been changed by hand since."""
    for case in TRAINED:
        if case.get("meant"):
            row = trained[case["name"]][0]
            count = case.get("frozen") or case.get("blocks", 4)
            assert row["used"][:count] == row["meant"][:count], case["name"]
    frozen = trained["frozen"][0]
    assert frozen["used"][1:3] != frozen["meant"][1:3], "trained weights travel as they are"


def test_ranks_send_what_the_plan_says(trained):
    """Catches: a hop that is made twice, or missing in the plan; bytes counted on the wrong side of a group."""
    for case in TRAINED:
        if case.get("micro_batches", 1) > 1:
            continue
        for row in trained[case["name"]]:
            assert row["counted"] == row["planned"], case["name"]
            crossing = sum(size for key, size in row["seen"].items() if key.endswith("across"))
            assert sum(row["seen"].values()) == row["counted"][0], case["name"]
            if HPZ.items() <= case["zero"].items() or "mesh" in case:
                # The others have no groups, and nothing that leaves one.
                assert crossing == row["counted"][1], case["name"]


def test_three_quarters_of_the_model_enter_a_group(trained):
    """What enters a group in a step, in units of the bf16 bytes that other groups have of the model: 0.5 + 0 + 0.25.

    2 % are for scales (1.05 %) and padding (0.35 %). Without, every rank of a group takes and gives its own three times
    that, less what memory still has when backward begins.

    Catches: scales of four bytes (2.1 % and padding), gradients that cross before they are summed in their group, a
    backward whose gather leaves its group.
    """
    rows = trained["zero++"]
    elsewhere = 2 * rows[0]["parameters"] * (FAR - 1) / FAR

    def entering(rows: list[dict[str, Any]]) -> float:
        sizes = [size for row in rows[:NEAR] for key, size in row["seen"].items() if key.endswith("across")]
        return sum(sizes) / elsewhere

    assert abs(entering(rows) - 0.75) < 0.02 * 0.75
    kinds = {key for key in rows[0]["seen"] if key.endswith("across")}
    assert kinds == {"all-gather across groups across", "all-to-all across groups across"}
    exact = trained["exact"]
    passes = 2 + exact[0]["gathered_twice"] / 4
    assert abs(entering(exact) / NEAR - passes) < 0.01 * passes
    assert 2.5 < passes <= 3


def test_a_run_has_the_bits_of_the_same_run_again(trained):
    # Catches: memory that is not what was written there, sums in the order of arrival.
    for one, other in zip(trained["zero++"], trained["again"], strict=True):
        assert [one[key] for key in ("losses", "norms", "used")] == [other[key] for key in ("losses", "norms", "used")]


def test_weights_cross_once_a_step_whatever_micro_batches_need(trained):
    """Catches: a first hop for every micro-batch, and one for backward. Norms are alike on all ranks."""
    row = trained["int8 in a group"][0]
    padded = 3 * 24576
    assert row["seen"]["all-gather across groups across"] == padded // WORLD * (FAR - 1) * 129 // 128
    assert "all-gather across" not in row["seen"]
    for rows in trained.values():
        assert all(each["norms"] == rows[0]["norms"] for each in rows)


def test_gradients_are_as_large_as_they_were(trained):
    """From the same weights, before the first update: the norm of what travelled as int4 beside the exact one.

    An element is off by at most half a scale, evenly: a variance of a twelfth of the scale's square. The scale is at
    most a seventh of the largest of 256, below 5 standard deviations of them. So the error has 0.044 of the energy of
    what each rank sends, and the norm grows by half of that share at most.

    Catches: a rank's gradients that are left out or counted twice, a sum that is not divided, and micro-batches that
    replace one another.
    """
    for name, exact in (
        ("int4", "exact, small"),
        ("int4, shard groups", "exact, two micro-batches"),
    ):
        ratio = trained[name][0]["norms"][0] / trained[exact][0]["norms"][0]
        assert 1 - 0.01 < ratio < 1 + 0.022, name


def test_memory_is_what_the_plan_says(trained):
    """Catches: codes, residuals or sums that no bucket has."""
    for name, rows in trained.items():
        for row in rows:
            for bucket in ("weights", "gradients"):
                assert row["usage"][bucket] == row["buckets"][bucket], (name, bucket)
    words = "\n".join(trained["zero++"][0]["described"])
    assert "between ranks weights as int8" in words
    assert "kept for a group of 2 ranks; gradients as int4 with error feedback" in words
    assert "weights of 1 of 3 units as int8" in "\n".join(trained["frozen"][0]["described"])


def test_with_error_feedback_the_mean_of_many_gradients_is_exact(others):
    """Against means in double precision. A value of 0.3 beside 7 in each block is below half a step of int4, 1, and
    always rounded to nothing: without error feedback all of it is lost but what the rank itself has.

    With it, what is sent differs from what should be by `e / (1 - beta)` in all, for each of those who quantise: `e`,
    an average of losses, is at most half a scale. The scale is at most the largest value over 7, of gradients in the
    first hop and of sums of a group in the second, plus what is kept of it (1 / 14 of it) and 2^-7 for its rounding.
    bf16 loses 2^-9 of what is kept, in each step. All is divided by the number of ranks, and the mean by that of steps.

    Catches: a residual that is left out in one of the hops, or added to another slice.
    """
    for case in FED:
        rows = others[case["name"]]
        assert len({row["apart"] for row in rows}) == 1
        apart, largest = rows[0]["apart"], rows[0]["largest"]
        near, far = (WORLD, 1) if "flat" in case["name"] else (NEAR, FAR)
        quantised = far * (near - 1) * largest + (far - 1) * near * largest
        kept = quantised / 7 * (1 + 1 / 14) * (1 + 2**-7) / 2 / WORLD
        if case["name"].endswith("with"):
            assert apart <= kept / (1 - 0.8) / case["steps"] + kept * 2**-9, case["name"]
            assert apart < 0.15 * others[case["name"] + "out"][0]["apart"]
        else:
            assert apart > 0.1, case["name"]


def test_a_sum_has_the_bits_of_both_hops_by_torch(others):
    """Catches: a slice that another rank sums, a first hop across groups, an own part that was quantised, another order
    of sums."""
    for case in FED:
        assert [row["expected"] for row in others[case["name"]]] == [True] * WORLD, case["name"]


def test_groups_have_the_same_weights_however_modules_run(others):
    """int8 weights are the same codes however ranks are grouped, and gradients are exact here: all three ways have the
    same bits, also where backward runs forward again, and where weights are read that no hook has announced.

    Catches: codes that one group has of another step than the next, and a part that is taken from another's place.
    """
    for case in GATHERED:
        family = case["family"]
        rows, expected = others[case["name"]], others[f"{family} over all"]
        assert [row["losses"] for row in rows] == [row["losses"] for row in expected], case["name"]
        assert len({*rows[0]["losses"]}) == 3


def test_a_model_learns_as_it_does_exactly(others):
    """24 steps of a tiny GPT; `benches/quantised_loss.py` makes 200 of a larger one.

    The first loss: a weight moves by at most half a scale, evenly, which is at most the largest weight over 127, so to
    first order the loss moves by at most six standard deviations of `scale / sqrt(12)` times the norm of its gradient:
    0.45, where 0.38 was seen. After that nothing bounds the distance of two courses of training but what they do: the
    exact loss falls by 40.5, and the mean of the last five was seen 0.06 above it, of which five times as much is
    allowed.

    Catches: weights or gradients that are not those of their places, gradients that are not averaged, and what is kept
    of one step added again and again.
    """
    exact, lossy = (others[case["name"]][0] for case in LEARNING)
    scale = exact["largest"] / 127 * (1 + 2**-7)
    assert 0 < abs(lossy["losses"][0] - exact["losses"][0]) < 6 * scale / 12**0.5 * exact["norm"]
    ends = [sum(each["losses"][-5:]) / 5 for each in (exact, lossy)]
    assert abs(ends[1] - ends[0]) < 0.3
    assert exact["losses"][0] - ends[0] > 40


def test_a_gradient_that_is_not_finite_leaves_out_the_step_on_all_ranks(others):
    """Catches: an infinity that becomes the largest code, what is kept of discarded gradients, and a norm that is not
    that of what is applied. A gradient of 6144 elements with 24 of 7 and the rest 0.3: its norm is 41.6; int4 has it
    within what rounds 0.3 to 0 or 1."""
    for case in SCALED:
        name, rows = case["name"], others[case["name"]]
        for row in rows:
            assert row["applied"] == [True, True, False, True, True], name
            assert row["skipped"] == 1
            assert row["scales"][2] > row["scales"][3], "an overflow halves the scale"
            assert row["scales"][1] < row["scales"][2], "and good steps double it"
            assert row["kept"][2] == 0 < min(row["kept"][:2] + row["kept"][3:])
            assert row["norms"][2] == float("inf")
            assert all(34 < norm < 90 for norm in row["norms"][:2] + row["norms"][3:]), row["norms"]
        assert len({tuple(row["norms"]) for row in rows}) == 1


def test_a_run_that_goes_on_has_the_bits_of_one_that_resumes(others):
    """A checkpoint does not hold what quantising has lost: it is forgotten at a save as at a load.

    Catches: residuals that live on after a save, or in an engine that loads.
    """
    for row in others["resume"]:
        assert row["ends"][0] == row["ends"][1]
        assert row["kept"][0] > 0 == row["kept"][1]


def test_through_shared_memory_the_keys_say_that_they_do_nothing(tmp_path):
    """Catches: weights that are quantised though nothing is sent, and silence about it."""
    plain = {"name": "plain", "zero": {}, **SMALL, "transport": "shared_memory"}
    asked = {**plain, "name": "asked", "zero": {**INT8, **INT4, **LOCO, **HPZ}}
    given = tmp_path / "cases.json"
    given.write_text(json.dumps([plain, asked]))
    results = run_ranks(2, PROGRAM, [str(given)])
    assert [result.code for result in results] == [0, 0], results[0].err
    rows = [json.loads(line.removeprefix("FOUND ")) for line in results[0].out.splitlines() if "FOUND" in line]
    assert rows[0]["losses"] == rows[1]["losses"]
    assert rows[0]["buckets"] == rows[1]["buckets"]
    for key in (*INT8, *INT4, *LOCO):
        line = f"config key zero_optimization.{key} has no effect: the ranks share this host's memory"
        assert results[0].err.count(line) == 1
        assert line not in results[1].err

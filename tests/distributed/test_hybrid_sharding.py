"""Hybrid sharding: shards within a group of ranks, replicas across groups.

Four real ranks in groups of two train with the bits of plain sharding at the same stage, and each step within the bound
of `traces.py` of PyTorch's own data-parallel training; what leaves a rank, within its group and across, is what the
formulas here and the plan say.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from families import build
from launching import run_ranks
from test_checkpoint_worlds import PROGRAM, tensors
from test_equivalence import check_bits, check_bounds, check_nothing_is_left, name_of, run

WORLD, GROUP = 4, 2
Case = dict[str, Any]

GROUPED: list[Case] = [
    {"mesh": {"dp_shard": GROUP}, "transport": "collective"},
    {"hpz": GROUP, "transport": "shared_memory"},
    {"hpz": GROUP, "param": "cpu", "optimizer": "cpu", "transport": "collective"},
    {"mesh": {"dp_replicate": 2}, "param": "cpu", "optimizer": "nvme", "transport": "shared_memory"},
    {"mesh": {"dp_shard": GROUP}, "param": "nvme", "optimizer": "nvme", "transport": "collective"},
    {"mesh": {"dp_shard": GROUP}, "param": "nvme", "optimizer": "nvme", "transport": "shared_memory"},
    {"mesh": {"dp_shard": GROUP}, "param": "nvme", "optimizer": "cpu", "transport": "collective"},
    {"mesh": {"dp_shard": GROUP}, "stage": 2, "optimizer": "nvme", "transport": "collective"},
    {"mesh": {"dp_shard": GROUP}, "stage": 1, "transport": "shared_memory"},
]
FAMILIES = {"gpt": {"extras": ["between"]}, "mixture": {}, "partly-frozen": {}}
TRACED = ("gpt", "mixture")
"""Families that DDP trains as well."""


def cases(folder: Path) -> list[Case]:
    """For each family plain sharding, the ways of grouping in turn (all of them for the first), and DDP."""
    found = []
    for number, (family, more) in enumerate(FAMILIES.items()):
        base = {"family": family, "group": family, "stage": 3, **more}
        grouped = GROUPED if number == 0 else GROUPED[number::5]
        for way in [{"transport": "collective"}, *grouped]:
            groups = f"{way.get('mesh')} {way.get('hpz')}"
            found.append({**base, **way, "name": name_of(family, {**base, **way}) + f" {groups}"})
        if family in TRACED:
            path = str(folder / family)
            found.append({"family": family, "plain": True, "record": path, "name": f"{family} DDP"})
            found.append({**base, **grouped[0], "follow": path, "name": f"{family} follows DDP"})
            del found[-1]["group"]
    return found


def trained_bytes(family: str, world: int) -> int:
    """fp32 bytes of the flat layouts of what is trained: blocks, and the rest at the root.

    As README.md says it: parameters begin at multiples of 64 elements, and a unit is padded to 2048 for each rank.
    """
    model = build(family)
    blocks = {id(param): number for number, block in enumerate(model.h) for param in block.parameters()}
    sizes: dict[int | None, int] = {}
    for param in model.parameters():
        if param.requires_grad:
            unit = blocks.get(id(param))
            sizes[unit] = sizes.get(unit, 0) + -(-param.numel() // 64) * 64
    return sum(-(-size // (2048 * world)) * 2048 * world * 4 for size in sizes.values())


@pytest.mark.timeout(900)
def test_groups_of_two_train_as_four_ranks_do(tmp_path):
    """Catches: gradients that are summed by group first, a replica that updates with another sum, a norm whose parts
    are added in another order, weights gathered over all ranks, an update that is sent twice or never."""
    given = cases(tmp_path)
    found = run(WORLD, given, tmp_path, timeout=600)
    check_bits(given, found)
    check_bounds(given, found)
    check_nothing_is_left(found)
    for case, result in zip(given, found, strict=True):
        if not case.get("plain"):
            check_bytes(case, result["last_step"])


def check_bytes(case: Case, sent: dict[str, list[int]]) -> None:
    """What left one rank in the last step of two micro-batches."""
    trained = trained_bytes(case["family"], WORLD)
    grouped = "mesh" in case or "hpz" in case
    shards = GROUP if grouped else WORLD
    if case["transport"] == "collective":
        # Twice: each rank sends every other rank the slice that that one sums, and other replicas the sums of its own.
        piece = trained // WORLD
        assert sent["reductions"] == [2 * piece * (shards - 1), 2 * piece * (WORLD - shards)]
        assert sent["updates"] == [0, 2 * piece * (WORLD // shards - 1)]
    else:
        piece = trained // shards
        assert sent["reductions"] == [2 * piece * (shards - 1), 2 * piece * (WORLD - shards)]
        assert sent["updates"] == [0, 0]


SCHEDULES = (
    f"sys.path.insert(0, {str(Path(__file__).parent)!r})"
    + """
import json
from families import build, micro_batch
from models import loss_of
import zeroxide
from zeroxide.plan.schedule import collectives, sent_across_groups, sent_bytes

from zeroxide.zero.messages import Messages

seen = {}
start = Messages.start

def spied(self, work, incoming, outgoing):
    # By the ranks that messages go to, whatever anybody counts.
    for rank, tensor in outgoing:
        where = "across" if rank // 2 != ranks.rank // 2 else "within"
        seen[work.kind, where] = seen.get((work.kind, where), 0) + tensor.nbytes
    return start(self, work, incoming, outgoing)

Messages.start = spied
torch.manual_seed(0)
rows = []
for mesh in ({}, {"dp_shard": 2}):
    for stage in (1, 3):
        for transport in ("collective", "shared_memory"):
            config = {
                "zero_optimization": {"stage": stage}, "steps_per_print": None,
                "zeroxide": {"transport": transport, "threads": 1, **({"mesh": mesh} if mesh else {})},
            }
            engine, *_ = zeroxide.initialize(model=build("gpt"), config=config, lr=1e-3)
            sent = engine.parts.reduction.sent
            for step in range(3):
                seen.clear()
                before = engine.exchanged_bytes(), sent.across
                engine.backward(loss_of(engine(**micro_batch("gpt", ranks.rank))))
                engine.step()
            plan = engine.plan()
            after = engine.exchanged_bytes(), sent.across
            gathered = sum(each.sent for each in collectives(plan) if each.kind == "all-gather")
            rows.append({
                "name": f"{mesh} stage {stage} {transport}",
                "counted": [now - then for now, then in zip(after, before)],
                "planned": [sent_bytes(plan), sent_across_groups(plan)],
                "gathered": gathered,
                "seen": {" ".join(key): value for key, value in seen.items()},
                "described": plan.describe(),
            })
            engine.destroy()
if ranks.rank == 3:
    say("FOUND " + json.dumps(rows))
"""
)


def test_the_plan_knows_what_crosses_the_groups():
    # Catches: a plan that counts a gather over all ranks, or leaves out that replicas exchange their sums.
    results = run_ranks(WORLD, SCHEDULES)
    assert [result.code for result in results] == [0] * WORLD, results[0].err
    line = next(line for line in results[3].out.splitlines() if line.startswith("FOUND "))
    rows = json.loads(line.removeprefix("FOUND "))
    for row in rows:
        assert row["counted"] == row["planned"], row["name"]
    by_name = {row["name"]: row for row in rows}
    trained = trained_bytes("gpt", WORLD)
    plain, grouped = (by_name[f"{mesh} stage 3 collective"] for mesh in ("{}", "{'dp_shard': 2}"))
    assert "all-gather across" not in grouped["seen"], "no weight leaves its group"
    assert grouped["seen"]["all-gather within"] == grouped["gathered"] > 0
    crossing = sum(size for kind, size in grouped["seen"].items() if kind.endswith("across"))
    assert crossing == grouped["counted"][1] == trained // WORLD * 3
    # With one group of four, two of the three ranks that each part goes to are in the other half.
    before = sum(size for kind, size in plain["seen"].items() if kind.endswith("across"))
    assert before == plain["counted"][0] * 2 // 3
    assert before - crossing == plain["gathered"] * 2 // 3 - trained // WORLD > 0, (
        "all gathers, for the sums of a slice"
    )
    words = "\n".join(by_name["{'dp_shard': 2} stage 3 shared_memory"]["described"])
    assert "one copy for the 2 ranks of a group" in words
    assert "ZeRO stage 3 over groups of 2 ranks, replicated across 2" in words


@pytest.mark.parametrize(("first", "second"), [("grouped", "plain"), ("plain", "grouped")])
def test_a_checkpoint_of_one_is_that_of_the_other(tmp_path, first, second):
    """Catches: an element that two replicas save or none, a replica that is not given its whole shard."""
    (tmp_path / "scratch").mkdir()
    home = f"nvme:{tmp_path / 'scratch'}"
    for way, act, stage in ((first, "save", 3), (second, "copy", 3)):
        more = ["groups of 2"] if way == "grouped" else []
        results = run_ranks(WORLD, PROGRAM, [act, str(tmp_path / "out"), str(stage), home, *more])
        assert [result.code for result in results] == [0] * WORLD, results[0].err
    saved, manifest = tensors(tmp_path / "out" / "global_step2")
    again, _ = tensors(tmp_path / "out" / "again" / "tag")
    assert again == saved
    for param in manifest["parameters"]:
        assert len(saved["weights", param["names"][0]]) == math.prod(param["shape"]), "every element once"
    # What goes on from the other's checkpoint goes on with the same bits.
    ends = []
    for way in (first, second):
        more = ["groups of 2"] if way == "grouped" else []
        results = run_ranks(WORLD, PROGRAM, ["resume", str(tmp_path / "out"), "3", "none", *more])
        assert [result.code for result in results] == [0] * WORLD, results[0].err
        ends.append([line for result in results for line in result.out.splitlines() if line.startswith("END ")])
    assert ends[0] == ends[1]
    assert len(ends[0]) == WORLD


DISAGREEING = """
import zeroxide
mesh = {"dp_shard": 2} if ranks.rank == 0 else {"dp_shard": 4}
try:
    zeroxide.initialize(model=torch.nn.Linear(4, 4), config={
        "zero_optimization": {"stage": 3}, "zeroxide": {"mesh": mesh}}, lr=1e-3)
except zeroxide.errors.RanksError as error:
    say("REFUSED", error)
"""


def test_ranks_that_group_themselves_differently_are_refused():
    results = run_ranks(WORLD, DISAGREEING)
    for result in results:
        assert result.code == 0, result.err
        assert "REFUSED ranks do not agree on config.zeroxide.mesh" in result.out, result.out
        assert "rank 0" in result.out


TORCH = """
import torch.distributed as dist
from zeroxide.config import Mesh
from zeroxide.distributed import ProcessMesh
for axes in (None, Mesh(dp_replicate=2, dp_shard=2), Mesh(pp=2, dp_shard=2), Mesh(dp_shard=2, tp=2)):
    mesh = ProcessMesh(ranks.rank, ranks.world, axes)
    made = mesh.device_mesh(ranks)
    for axis, name in enumerate(made.mesh_dim_names):
        group = mesh.group(name)
        assert dist.get_process_group_ranks(made.get_group(name)) == list(group.ranks)
        assert made.get_local_rank(name) == group.position == mesh.coordinates()[name]
        sums = torch.tensor([float(ranks.rank)])
        dist.all_reduce(sums, group=made.get_group(name))
        assert sums.item() == sum(group.ranks)
say("done")
"""


def test_torchs_device_mesh_is_the_same_grid():
    # Catches: groups of torch's mesh that are not those of the arithmetic.
    for result in run_ranks(WORLD, TORCH):
        assert result.code == 0, result.err
        assert "done" in result.out


ACCESS = (
    f"sys.path.insert(0, {str(Path(__file__).parent)!r})"
    + """
import zeroxide
from families import build, micro_batch
from models import loss_of

def values(mesh, transport):
    model = build("gpt")
    config = {"zero_optimization": {"stage": 3}, "zeroxide": {"transport": transport, "threads": 1, "mesh": mesh}}
    engine, *_ = zeroxide.initialize(model=model, config=config, lr=1e-2)
    params = list(model.parameters())
    found = []
    for step in range(3):
        engine.backward(loss_of(engine(**micro_batch("gpt", ranks.rank + step))))
        found += [zeroxide.safe_get_full_grad(each) for each in params]
        if step == 1:
            zeroxide.safe_set_full_grad(params[2], torch.full(params[2].ds_shape, 0.25))
        engine.step()
        found += [zeroxide.safe_get_full_fp32_param(each) for each in params]
        found += [zeroxide.safe_get_full_optimizer_state(each, "exp_avg") for each in params]
        with zeroxide.zero.GatheredParameters(params[:2], modifier_rank=3):
            if ranks.rank == 3:
                params[0].data.mul_(1.5)
        zeroxide.safe_set_full_optimizer_state(params[1], torch.full(params[1].ds_shape, 0.5), "exp_avg_sq")
        part = zeroxide.safe_get_local_fp32_param(params[3])
        zeroxide.safe_set_local_fp32_param(params[3], part * 2)
    found += list(engine.module_state_dict().values())
    size = zeroxide.safe_get_local_fp32_param(params[0]).numel()
    engine.destroy()
    return found, size

for transport in ("collective", "shared_memory"):
    plain, own = values({}, transport)
    grouped, shard = values({"dp_shard": 2}, transport)
    assert len(plain) == len(grouped) > 50
    assert all(torch.equal(one, other) for one, other in zip(plain, grouped)), transport
    sizes = ranks.gather_objects([own, shard])
    whole = plain[0].numel()
    assert sum(each for each, _ in sizes) == whole and sum(each for _, each in sizes) == 2 * whole
say("done")
"""
)


def test_values_are_read_and_changed_as_with_plain_sharding():
    # Catches: a change that reaches one replica alone, a value put together from shards of another size.
    for result in run_ranks(WORLD, ACCESS):
        assert result.code == 0, result.err
        assert "done" in result.out

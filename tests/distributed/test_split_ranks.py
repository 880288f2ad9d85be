"""Groups of ranks that an engine lives on as if they were all: real processes over gloo."""

from __future__ import annotations

import json

from launching import Job, run_ranks

GROUPS = """
import json
from zeroxide.config import Mesh
from zeroxide.distributed import ProcessMesh, Watch, split_job

job = split_job(ranks, ProcessMesh(ranks.rank, ranks.world, Mesh(dp_shard=2, tp=2)))
"""

SAY = (
    GROUPS
    + """
found = []
for each in job.groups():
    mine = torch.full((3,), float(ranks.rank))
    found.append({
        "rank": each.rank, "world": each.world, "numbers": [each.number(at) for at in range(each.world)],
        "gathered": each.gather_objects(ranks.rank), "rows": each.gather_rows(mine).tolist(),
        "broadcast": each.broadcast_tensor(mine.clone(), 1).tolist(),
        "shares": [each.same_host, each.same_network, each.shares_memory] == 3 * [True],
        "local": [each.local_rank, each.local_world],
    })
    each.barrier()
say(json.dumps(found))
job.close()
# The job goes on without them.
say(ranks.gather_objects(ranks.rank))
ranks.close()
"""
)

LOST = (
    GROUPS
    + """
with Watch(ranks, parts=job.groups(), timeout=20.0):
    ranks.barrier()
    say("ready")
    if ranks.rank == 3:
        time.sleep(60)
    try:
        if ranks.rank == 1:
            job.ranks.barrier()
        else:
            time.sleep(60)
    except Exception as error:
        say(type(error).__name__, error, job.ranks.lost is not None)
        raise
"""
)


def test_collectives_of_a_group_are_its_own():
    """Catches: numbers of the job in the place of those of the group, a group of the wrong ranks, a process group that
    outlives its job, and one that takes the job's with it."""
    for rank, result in enumerate(run_ranks(4, SAY)):
        assert result.code == 0, result.err
        said = result.out.splitlines()
        assert json.loads(said[1]) == [0, 1, 2, 3]
        # Ranks count through tp first.
        alike, others = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        for group, found in zip((alike, others), json.loads(said[0]), strict=True):
            assert found == {
                "rank": group.index(rank),
                "world": 2,
                "numbers": group,
                "gathered": group,
                "rows": [[float(each)] * 3 for each in group],
                "broadcast": [float(group[1])] * 3,
                "shares": True,
                "local": [rank, 4],
            }


def test_a_group_knows_of_a_rank_that_is_lost():
    """Catches: a watch that tells the job alone, so that the group's collective fails with gloo's words."""
    with Job(4, LOST) as job:
        for rank in range(4):
            job.until(rank, "ready")
        job.kill(3)
        results = job.wait()
    assert results[1].code != 0
    assert "RanksError" in results[1].out
    assert "rank 3 was killed" in results[1].out
    assert results[1].out.rstrip().endswith("True")

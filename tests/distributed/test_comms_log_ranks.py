"""The log of collectives between real ranks: bytes against docs/collectives.md and the plan."""

from __future__ import annotations

import json

import pytest
from launching import run_ranks

WIDTH, BLOCKS, STEPS, WORLD = 128, 4, 2, 2
JOB = f"""
import json
from torch import nn
import zeroxide
from zeroxide.distributed import COMMS, log_summary
from zeroxide.plan.schedule import collectives

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList(nn.Linear({WIDTH}, {WIDTH}, bias=False) for _ in range({BLOCKS}))

    def forward(self, x):
        for at, each in enumerate(self.h):
            x = each(x).tanh()
            if at == 0:
                # By then the gradient of the last block has gone out.
                x.register_hook(lambda grad: say("REACHED", time.perf_counter()))
        return x.float().square().mean()

log = {{"comms_logger": {{"enabled": True, "debug": True}}}} if sys.argv[2] == "on" else {{}}
config = {{
    "bf16": {{"enabled": True}},
    "gradient_clipping": 1.0,
    "zero_optimization": {{"stage": 3}},
    "zeroxide": {{"transport": sys.argv[1], "prefetch": 0}},
}}
torch.manual_seed(0)
engine, *_ = zeroxide.initialize(model=Layers().bfloat16(), config=config | log, lr=0.1)
COMMS.reset()
for _ in range({STEPS}):
    loss = engine(torch.full((2, {WIDTH}), 0.01 * (1 + ranks.rank), dtype=torch.bfloat16))
    if sys.argv[3:] == ["late"] and ranks.rank == 1:
        time.sleep(0.3)
        say("BEGINS", time.perf_counter())
    engine.backward(loss)
    engine.step()
    say("loss", loss.item())
planned = [(each.kind, each.unit, each.sent) for each in collectives(engine.plan())]
found = log_summary(show_straggler=True, return_dict=True)
say("FOUND " + json.dumps([planned, found, COMMS.enabled]))
engine.destroy()
log_summary()
"""


def run(transport, switch="on", *more):
    results = run_ranks(WORLD, JOB, [transport, switch, *more])
    assert [result.code for result in results] == [0] * WORLD, results[0].err
    found = []
    for result in results:
        (line,) = (each for each in result.out.splitlines() if each.startswith("FOUND "))
        found.append(json.loads(line.removeprefix("FOUND ")))
    return results, found


def sums(summary):
    """{line of the log: (collectives, bytes)}."""
    return {
        name: (sum(each["count"] for each in sizes.values()), sum(each["count"] * int(n) for n, each in sizes.items()))
        for name, sizes in summary.items()
    }


WORDS = ("REACHED", "BEGINS")

# What comes to a rank of two of one block in bf16: the half that the other has.
PART = WIDTH * WIDTH * 2 * (WORLD - 1) // WORLD


def test_messages_carry_what_the_formula_says():
    """Catches: bytes that leave counted with those that come, a work that is not found complete, one counted twice."""
    results, found = run("collective")
    for planned, said, _ in found:
        logged = sums(said["summary"])
        norm = logged.pop("all_gather of small values")
        assert norm[0] == STEPS
        # Gradients: all of the model once a step.
        gradients = {name: each for name, each in logged.items() if name.startswith("all_to_all")}
        assert gradients == {f"all_to_all | h.{at}": (STEPS, STEPS * PART) for at in range(BLOCKS)}
        # Weights: all of it in forward, and again in backward but for what is still there, as the plan says.
        weights = {name: each for name, each in logged.items() if name not in gradients}
        units = [unit for kind, unit, _ in planned if kind == "all-gather"]
        assert units[:BLOCKS] == [f"h.{at}" for at in range(BLOCKS)]
        assert BLOCKS < len(units) < 2 * BLOCKS
        assert weights == {
            f"all_gather | {unit}": (STEPS * units.count(unit), STEPS * units.count(unit) * PART) for unit in units
        }
        stragglers = said["straggler_analysis"]
        assert stragglers.keys() == said["summary"].keys()
        assert all(each["total_straggler_ms"] >= 0 for sizes in stragglers.values() for each in sizes.values())
    # Rank 0 alone prints, also when the engine has ended.
    assert results[0].out.count("Comm. Op") == 3
    assert results[1].out.count("Comm. Op") == 0


def test_gradients_through_shared_memory_are_logged_as_well():
    _, found = run("shared_memory")
    for _, said, _ in found:
        logged = sums(said["summary"])
        assert logged.pop("all_gather of small values")[0] == STEPS
        assert logged == {f"reduce_scatter in memory | h.{at}": (STEPS, STEPS * PART) for at in range(BLOCKS)}


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_a_rank_that_comes_late_is_in_the_latency(transport):
    """Between the moment at which rank 0's gradient had gone out and that at which rank 1 began its backward, both on
    one clock, nothing can have been complete. Catches: a latency that ends when it is looked at, and not when it is
    complete."""
    results, found = run(transport, "on", "late")
    times = [[float(line.split()[1]) for line in each.out.splitlines() if line.startswith(WORDS)] for each in results]
    reached, begins = times[0], times[1][::2]
    assert len(reached) == len(begins) == STEPS
    waited = sum(max(0.0, late - sent) for late, sent in zip(begins, reached, strict=True)) * 1e3
    summary = found[0][1]["summary"]
    (name,) = (each for each in summary if not each.startswith("all_gather") and each.endswith(f"h.{BLOCKS - 1}"))
    assert sum(each["total_latency_ms"] for each in summary[name].values()) >= waited


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_without_the_key_nothing_is_logged_and_the_numbers_are_the_same(transport):
    results, found = run(transport, "off")
    assert [(said["summary"], enabled) for _, said, enabled in found] == [({}, False)] * WORLD
    logged, _ = run(transport)
    for off, on in zip(results, logged, strict=True):
        losses = [line for line in off.out.splitlines() if line.startswith("loss")]
        assert losses == [line for line in on.out.splitlines() if line.startswith("loss")]
        assert len(losses) == STEPS


SCRIPT = """
import json
import zeroxide.integrations.deepspeed
from deepspeed import comm
from zeroxide.distributed import COMMS, log_summary

ones = lambda *shape: torch.full(shape, 1.0 + comm.get_rank())
COMMS.ranks = ranks
comm.configure(enabled=sys.argv[1] == "on")
values = ones(6)
comm.all_reduce(values)
assert values.tolist() == [3.0] * 6
handle = comm.all_reduce(values, async_op=True)
handle.wait()
assert handle.is_completed() and values.tolist() == [6.0] * 6
rows = [torch.empty(3) for _ in range(2)]
comm.all_gather(rows, ones(3))
assert torch.stack(rows).tolist() == [[1.0] * 3, [2.0] * 3]
joined = torch.empty(6)
comm.all_gather_into_tensor(joined, ones(3))
assert joined.tolist() == [1.0] * 3 + [2.0] * 3
part = torch.empty(3)
comm.reduce_scatter_tensor(part, ones(6))
assert part.tolist() == [3.0] * 3
# The first rank sends the other three rows of two, and gets one.
sent, got = ([1, 3], [1, 1]) if comm.get_rank() == 0 else ([1, 1], [3, 1])
rows = torch.empty(sum(got), 2)
comm.all_to_all_single(rows, ones(sum(sent), 2), output_split_sizes=got, input_split_sizes=sent)
even = torch.empty(4)
comm.all_to_all_single(even, ones(4))
assert even.tolist() == [1.0, 1.0, 2.0, 2.0]
comm.broadcast(values, 0)
(comm.send if comm.get_rank() == 0 else comm.recv)(values, 1 - comm.get_rank())
work = (comm.isend if comm.get_rank() == 0 else comm.irecv)(values, 1 - comm.get_rank())
work.wait()
comm.reduce(values, dst=0)
comm.gather(ones(3), [torch.empty(3), torch.empty(3)] if comm.get_rank() == 0 else None, dst=0)
comm.scatter(torch.empty(3), [ones(3), ones(3)] if comm.get_rank() == 0 else None, src=0)
comm.barrier()
comm.configure(enabled=False)
comm.barrier()
say("FOUND " + json.dumps(log_summary(return_dict=True)["summary"]))
"""


def collectives_of_a_script(switch):
    results = run_ranks(WORLD, SCRIPT, [switch])
    assert [result.code for result in results] == [0] * WORLD, results[0].err
    lines = [line for result in results for line in result.out.splitlines() if line.startswith("FOUND ")]
    return [sums(json.loads(line.removeprefix("FOUND "))) for line in lines]


def test_collectives_of_scripts_are_logged():
    """Catches: a collective that is not logged, or logged though the log is off; bytes of a rank's own part counted
    with those of others; what is under way logged before somebody has waited for it, or twice."""
    first, second = collectives_of_a_script("on")
    # Of two ranks: half of six numbers of four bytes come as parts and half as sums, twice.
    alike = {
        "all_reduce": (2, 2 * 24),
        "all_gather": (2, 2 * 12),
        "reduce_scatter": (1, 12),
        "broadcast": (1, 24),
        "reduce": (1, 24),
        "gather": (1, 12),
        "scatter": (1, 12),
        "barrier": (1, 0),
    }
    expected = [{"all_to_all": (2, 8 + 8), "send": (2, 48)}, {"all_to_all": (2, 24 + 8), "recv": (2, 48)}]
    for found, own in zip((first, second), expected, strict=True):
        assert found == {f"{op} of scripts": each for op, each in (alike | own).items()}
    assert collectives_of_a_script("off") == [{}, {}]

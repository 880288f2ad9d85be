"""An error of one rank in what all do together is raised on every rank, with its class and all that it carries."""

from __future__ import annotations

import json
from pathlib import Path

from launching import run_ranks

HERE = Path(__file__).parent

MEET = """
import errno, json
from pathlib import Path
from zeroxide import errors
from zeroxide.checkpoint.agree import Team

def corrupt():
    # Fields that the core sets, a checksum above 2^63 among them.
    error = errors.StorageError("tile 3 is damaged", path="/scratch/blocks.bin")
    error.block, error.tile, error.expected, error.got = "unit 0 weight", 3, (1 << 64) - 1, 0
    return error

def odd():
    error = errors.ModelError("a model", name="h.1")
    error.value = object()
    error.add_note("a note")
    return error

CASES = {
    "budget": lambda: errors.BudgetError("too small", need=10, limit=7, bucket="gathered"),
    "config": lambda: errors.ConfigError("a: b", path="a.b", expected="an int", got="'x'", problems=["a: b", "c: d"]),
    "corrupt": corrupt,
    "full": lambda: errors.StorageError("full", path=Path("/a"), errno=errno.ENOSPC),
    "nowhere": lambda: errors.StorageError("full"),
    "file": lambda: errors.CheckpointError("damaged", path="/out/tag/manifest.json"),
    "directory": lambda: errors.CheckpointError("missing"),
    "model": odd,
    "data": lambda: errors.DataError("no data", path="/data"),
    "numerics": lambda: errors.NumericsError("not finite", step=3, value=float("inf")),
    "ranks": lambda: errors.RanksError("ranks do not agree", ranks=[0, 2]),
    "another's": lambda: OSError(errno.EIO, "a disk"),
}
team = Team(ranks)
for name, made in CASES.items():
    def act():
        if ranks.rank > 0:
            raise made()
    try:
        team.together(act, Path("/out/tag"))
    except (errors.ZeroxideError, OSError) as error:
        carried = {key: value for key, value in vars(error).items() if key != "__notes__"}
        say(json.dumps([name, type(error).__name__, str(error), repr(sorted(carried.items()))]))
say("values", team.together(lambda: ranks.rank, Path("/out/tag")))
"""


def carried(**fields: object) -> str:
    return repr(sorted(fields.items()))


EXPECTED = {
    "budget": ("BudgetError", "too small", carried(need=10, limit=7, bucket="gathered")),
    "config": (
        "ConfigError", "a: b", carried(path="a.b", expected="an int", got="'x'", problems=("a: b", "c: d")),
    ),
    "corrupt": (
        "StorageError", "tile 3 is damaged",
        carried(
            path="/scratch/blocks.bin", errno=None, block="unit 0 weight", tile=3, expected=(1 << 64) - 1, got=0,
        ),
    ),
    "full": ("StorageError", "full", carried(path="/a", errno=28)),
    "nowhere": ("StorageError", "full", carried(path="/out/tag", errno=None)),
    "file": ("CheckpointError", "damaged", carried(path="/out/tag/manifest.json")),
    "directory": ("CheckpointError", "missing", carried(path="/out/tag")),
    "model": ("ModelError", "a model", carried(name="h.1")),
    "data": ("DataError", "no data", carried(path="/data")),
    "numerics": ("NumericsError", "not finite", carried(step=3, value=float("inf"))),
    "ranks": ("RanksError", "ranks do not agree", carried(ranks=(0, 2))),
    "another's": ("CheckpointError", "OSError: [Errno 5] a disk", carried(path="/out/tag")),
}  # fmt: skip


def test_the_error_of_a_rank_is_raised_on_all_with_its_class_and_fields():
    """Catches: an error that crosses as text, as another class, or with a field that no message can carry, for which
    the other ranks would wait in vain."""
    results = run_ranks(3, MEET)
    for rank, result in enumerate(results):
        assert result.code == 0, result.err
        *lines, last = result.out.splitlines()
        assert last == "values [0, 1, 2]"
        found = {name: tuple(rest) for name, *rest in map(json.loads, lines)}
        expected = {name: (kind, f"rank 1: {line}", fields) for name, (kind, line, fields) in EXPECTED.items()}
        if rank > 0:
            # What is no error of zeroxide is raised as it is where it came up.
            expected["another's"] = ("OSError", "[Errno 5] a disk", carried())
        assert found == expected, f"rank {rank}"


DAMAGE = """
import json, os
import zeroxide
from zeroxide.errors import StorageError
from families import build, micro_batch

home = {"device": "nvme", "nvme_path": FOLDER}
config = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "offload_param": home, "offload_optimizer": home},
    "zeroxide": {"threads": 1, "staging_bytes": 4 << 20},
    "steps_per_print": None,
}
engine, *_ = zeroxide.initialize(model=build("gpt"), config=config)
engine.backward(engine(**micro_batch("gpt", 0)))
engine.step()
ranks.barrier()
if ranks.rank == 1:
    mine = {os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if int(each) > 2}
    (file,) = [each for each in mine if each.endswith("blocks.bin")]
    with open(file, "r+b") as handle:
        handle.write(os.urandom(os.path.getsize(file)))
try:
    engine.save_checkpoint(FOLDER + "/out", "tag")
except StorageError as error:
    say(json.dumps([str(error), vars(error)]))
engine.destroy()
"""


def test_a_damaged_tile_of_one_rank_is_told_to_all_with_its_numbers(tmp_path):
    """Catches: numbers of the core that only the rank has whose disk it is."""
    program = f"sys.path.insert(0, {str(HERE)!r})\n" + DAMAGE.replace("FOLDER", repr(str(tmp_path)))
    found = []
    for result in run_ranks(2, program):
        assert result.code == 0, result.err
        found.append(json.loads(result.out))
    assert found[0] == found[1]
    line, fields = found[0]
    assert line.startswith("rank 1: ")
    assert fields["path"].endswith("blocks.bin")
    assert fields["block"].startswith("unit ")
    assert fields["expected"] != fields["got"]
    assert {f"{fields['expected']:016x}", f"{fields['got']:016x}"} <= set(line.replace(",", " ").split())

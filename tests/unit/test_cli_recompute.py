"""`zeroxide train --recompute`: what it may be, and how many blocks "auto" comes to."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from zeroxide import _core
from zeroxide.cli.planning.measured import Machine, Measurements, cache_file, machine_key
from zeroxide.cli.training.models import PRESETS, preset
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.recompute import with_blocks_chosen
from zeroxide.distributed import Ranks
from zeroxide.errors import BudgetError, ConfigError, StorageError

pytest.importorskip("transformers")

MIB = 1 << 20
CHOICE = preset("small", {**PRESETS["tiny"], "n_layer": 3, "n_positions": 64})
OPTIONS = TrainOptions(batch_size=256, seq_len=64, recompute="auto", host_memory="1GiB", threads=1, steps=3)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine on which a process takes 100 MiB."""
    monkeypatch.setenv("ZEROXIDE_CACHE_DIR", str(tmp_path))
    known = Machine(100 * MIB, 0, 1e-6, dict.fromkeys(_core.formats(), 1e-9), flops=1e9, bytes_per_second=1e10)
    known.taken = time.time()
    Measurements(known).save(cache_file(), machine_key(1))


def chosen(options: TrainOptions, ranks: Ranks | None = None) -> tuple[str, str]:
    """What it comes to, and the line about it."""
    said: list[str] = []
    found = with_blocks_chosen(options.checked(), CHOICE, ranks or Ranks(), said.append)
    return found.recompute, "".join(said)


def test_auto_is_as_few_blocks_as_the_budget_takes():
    """What each budget says it takes, with 4 MiB less takes a block more. Catches: a count that does not fit, or that
    leaves room for another block, and a budget that is exceeded without a word."""
    counts, limit = [], "64GiB"
    for _ in range(4):
        count, line = chosen(replace(OPTIONS, host_memory=limit))
        takes = re.search(r"recompute: (\w+) of 3 blocks, .* expected to take ([0-9.]+) MiB of", line)
        assert takes is not None, line
        assert takes[1] == count
        counts.append(count)
        limit = f"{int(float(takes[2])) - 4}MiB"
    assert counts == ["none", "1", "2", "3"]
    with pytest.raises(
        BudgetError, match=r"recompute auto: small with all 3 blocks recomputed takes .* give \d+MiB"
    ) as no:
        chosen(replace(OPTIONS, host_memory=limit))
    assert no.value.need > no.value.limit


def test_a_number_stays_as_it_is():
    for asked in ("none", "all", "3"):
        assert chosen(replace(OPTIONS, recompute=asked, host_memory=None)) == (asked, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recompute": "some"}, "--recompute some must be none, all, auto or a number of blocks"),
        ({"recompute": "-1"}, "--recompute -1 must be"),
        ({"host_memory": None}, "--recompute auto needs --host-memory"),
        ({"activation_path": "x"}, "--recompute auto and --activation-path both choose"),
        ({"recompute": "2", "activation_checkpointing": True}, "and --activation-checkpointing would compute"),
    ],
)
def test_what_does_not_go_together(change, said):
    with pytest.raises(ConfigError, match=said) as caught:
        replace(OPTIONS, **change).checked()
    assert caught.value.path == "recompute"


def test_ranks_on_several_hosts_need_a_number():
    with pytest.raises(ConfigError, match="ranks on several hosts"):
        chosen(OPTIONS, Ranks(world=4, local_world=2))


def test_the_directory_of_the_run_need_not_be_there_yet(tmp_path):
    directory = tmp_path / "runs" / "blocks"
    assert chosen(replace(OPTIONS, offload=f"nvme:{directory}"))[0] == "none"
    assert directory.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"--offload nvme:{tmp_path}/file/blocks: Not a directory"):
        chosen(replace(OPTIONS, offload=f"nvme:{tmp_path}/file/blocks"))


def test_gradients_that_backward_consumes_leave_their_room_to_activations(tmp_path):
    """Catches: a rehearsal of a run whose updates wait for the step."""
    limit = {}
    for early in ("never", "always", "adaptive"):
        asked = replace(OPTIONS, offload=f"nvme:{tmp_path}", clip=0.0, update_in_backward=early, host_memory="64GiB")
        takes = re.search(r"expected to take ([0-9.]+) MiB", chosen(asked)[1])
        assert takes is not None
        limit[early] = float(takes[1])
    assert limit["always"] == limit["adaptive"] < limit["never"]

"""Lightning's Trainer and Fabric with zeroxide's strategies: the packages as they are, on one rank and on two.

Numbers are compared with those of Lightning's own DDP in fp32 on the same data; tolerance: see `test_trainer.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import HERE, PACKAGE, run_cases

CLOSE = 2e-6

ONE_RANK = [
    ("plain", "ddp", []),
    ("stage 1", "zeroxide_stage_1_offload", []),
    ("stage 3", "zeroxide_stage_3", ["late"]),
    ("stage 3 nvme", "nvme", []),
    ("config", "config", []),
    ("resumed", "zeroxide_stage_3", ["resume stage 3"]),
]
TWO_RANKS = [
    ("ranks 2", "zeroxide_stage_2", ["two ranks"]),
    ("ranks 3", "zeroxide_stage_3_offload", ["two ranks", "late"]),
    ("ranks resumed", "zeroxide_stage_3", ["two ranks", "resume stage 1"]),
]
FABRIC_ONE = [
    ("plain", "ddp", ["plain"]),
    ("stage 2", "zeroxide_stage_2", []),
    ("stage 3", "zeroxide_stage_3", []),
    ("resumed", "zeroxide_stage_3", ["resume stage 3"]),
]
FABRIC_TWO = [
    ("ranks", "zeroxide_stage_3", ["two ranks"]),
    ("ranks resumed", "zeroxide", ["two ranks", "resume stage 2"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def found(folder):
    alone = run_cases("lightning_program.py", folder, ONE_RANK)
    # Lightning starts the second rank.
    return alone | run_cases("lightning_program.py", folder, TWO_RANKS)


@pytest.fixture(scope="module")
def fabric(tmp_path_factory):
    place = tmp_path_factory.mktemp("fabric")
    alone = run_cases("fabric_program.py", place, FABRIC_ONE)
    return place, alone | run_cases("fabric_program.py", place, FABRIC_TWO, "--ranks", "2")


@pytest.mark.parametrize(
    "name", [name for name, _, more in ONE_RANK + TWO_RANKS if not any("resume" in m for m in more)]
)
def test_numbers_are_those_of_ddp(found, name):
    """Catches: a loss divided twice, a step left out at the end of an epoch, clipping by another norm, a schedule over
    groups that the engine does not have, weights of before the last step, parts of a rank left out of an evaluation."""
    ours, plain = found[name], found["plain"]
    assert (ours["steps"], len(ours["losses"])) == (9, 15)
    assert ours["rates"] == pytest.approx(plain["rates"])
    for key in ("losses", "validation", "test"):
        assert ours[key] == pytest.approx(plain[key], rel=CLOSE), key
    if "two ranks" not in {each[0]: each[2] for each in ONE_RANK + TWO_RANKS}[name]:
        assert ours["predicted"] == plain["predicted"]


@pytest.mark.parametrize(("name", "whole", "same"), [("resumed", "stage 3", True), ("ranks resumed", "plain", False)])
def test_training_goes_on_from_a_folder(found, folder, name, whole, same):
    """With the same bits, and close to them on another number of ranks. Catches: optimizer state, counters or rates
    that begin anew."""
    ours, expected = found[name], found[whole]
    assert ours["steps"] == 9
    assert ours["rates"] == pytest.approx(expected["rates"][5:])
    assert ours["losses"] == (expected["losses"][5:] if same else pytest.approx(expected["losses"][5:], rel=CLOSE))
    if same:
        one, other = (torch.load(folder / f"{each}.pt") for each in (name, whole))
        assert all(torch.equal(values, other[key]) for key, values in one.items())


@pytest.mark.parametrize("name", [name for name, *_ in ONE_RANK[1:] + TWO_RANKS])
def test_weights_are_whole(found, folder, name):
    """Catches: empty tensors, one rank's part, names of the engine."""
    ours, plain = (torch.load(folder / f"{each}.pt") for each in (name, "plain"))
    assert {key: values.shape for key, values in ours.items()} == {key: values.shape for key, values in plain.items()}
    # Adam turns roundings into parts of a rate of 1e-2 for at most nine steps; together they are far below one.
    apart = torch.cat([(ours[key] - values).flatten() for key, values in plain.items()])
    assert apart.square().mean().sqrt() <= 1e-5


def test_folders_and_files(found, folder):
    """Catches: a checkpoint of before left beside the new one, a file where a folder is expected, a stale link."""
    for name in ("stage 3", "ranks 3"):
        place = folder / name
        assert {"epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"} <= {each.name for each in place.iterdir()}
        assert (place / "last.ckpt").resolve() == (place / "epoch=2.ckpt").resolve()
        assert sorted(each.name for each in (place / "epoch=2.ckpt").glob("[!.]*"))[:2] == ["checkpoint", "latest"]
        assert len(list((place / "epoch=2.ckpt").glob("lightning-*.pt"))) == 1
        weights = torch.load(place / "weights-step=9.ckpt")["state_dict"]
        expected = torch.load(folder / f"{name}.pt")
        assert all(torch.equal(values, expected[key]) for key, values in weights.items())


def test_fabric(fabric):
    """Catches: accumulation that forgets or divides, a clipping that stays for the next step, state not loaded."""
    place, runs = fabric
    plain = runs["plain"]
    for name, ours in runs.items():
        first = 6 if "resumed" in name else 0
        assert ours["losses"] == pytest.approx(plain["losses"][first:], rel=CLOSE), name
        assert ours["norms"] == pytest.approx(plain["norms"][first // 6 :], rel=CLOSE), name
    one, other = (torch.load(place / f"{each}.pt") for each in ("resumed", "stage 3"))
    assert all(torch.equal(values, other[key]) for key, values in one.items())


def test_runs_one_after_another():
    """All of `lightning_runs.py`, in a process that may import Lightning: that settles what `deepspeed` is there."""
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "lightning_runs.py"],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout[-10000:]
    assert " passed" in ended.stdout


def test_without_lightning(tmp_path: Path):
    """Catches: an import of zeroxide that imports lightning, and a traceback where there is none."""
    source = """
import sys
import zeroxide, zeroxide.engine.entry
assert "lightning" not in sys.modules
from importlib import machinery
machinery.PathFinder.find_spec, found = (
    lambda name, *rest: None if name == "lightning" else found(name, *rest)), machinery.PathFinder.find_spec
try:
    import zeroxide.integrations.lightning
except ImportError as error:
    print(error)
"""
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": modules}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("zeroxide.integrations.lightning needs lightning, which is not installed")
    assert ended.stdout.count("\n") == 1

"""The scripts of `examples`, as a user would start them, at small size."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import PACKAGE

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--width", "32", "--layers", "1"]


def run(*command: object, folder: Path, **env: str) -> str:
    """What it prints. Its end is 0."""
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return ended.stdout


def test_lightning_gpt(tmp_path: Path):
    """Catches: an option that Lightning no longer has, a checkpoint that another number of devices does not load."""
    script = [sys.executable, "-W", "ignore", EXAMPLES / "lightning_gpt.py", *SMALL, "--length", "16"]
    run(*script, "--steps", 2, "--devices", 2, "--out", "two", folder=tmp_path)
    assert {"epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "weights.ckpt"} <= {
        p.name for p in (tmp_path / "two").iterdir()
    }
    shown = run(*script, "--steps", 3, "--resume", "two/epoch=0-step=2.ckpt", "--out", "one", folder=tmp_path)
    assert (tmp_path / "one/epoch=0-step=3.ckpt").is_dir()
    # What a byte costs that nothing is known of is log 256.
    assert 4.5 < float(re.search(r"validation\W+([0-9.]+)", shown)[1]) < 6.5


def test_torchrun_and_slurm(tmp_path: Path):
    """`srun` is played by two shells with its variables. Catches: a rank that takes itself for the only one, a script
    that does not go on from what one rank has saved."""
    script = EXAMPLES / "torchrun_train.py"
    shown = run(
        sys.executable, "-W", "ignore", script, *SMALL, "--steps", 2, "--out", tmp_path / "out", folder=tmp_path
    )
    assert shown.startswith("1 ranks, steps 0 to 2, loss 5.")
    tools = tmp_path / "bin"
    tools.mkdir()
    # A link would leave the packages of a virtual environment behind.
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore "$@"\n')
    (tools / "srun").write_text(
        "#!/bin/bash\nset -eu\n[ $1 = --kill-on-bad-exit=1 ]; shift\n"
        "for rank in 1 0; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NODEID=0 "
        'SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost "$@" & done\nwait -n; wait\n'
    )
    for each in tools.iterdir():
        each.chmod(0o755)
    known = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    slurm = ["bash", EXAMPLES / "slurm.sh", *SMALL, "--steps", 3, "--out", tmp_path / "out"]
    # The script is named from where the repository is, as a job's would be.
    shown = run(*slurm, folder=EXAMPLES.parent, SLURM_TMPDIR=str(tmp_path / "scratch"), **known)
    assert shown.startswith("2 ranks, steps 2 to 3, loss 5.")
    assert {"global_step2", "global_step3", "latest", "model"} <= {each.name for each in (tmp_path / "out").iterdir()}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_train(tmp_path: Path):
    """Catches: an engine that makes a process group beside Ray's, or ends it."""
    script = [sys.executable, "-W", "ignore", EXAMPLES / "ray_train.py", "--steps", 3, "--width", 32, "--workers", 2]
    # Ray keeps a token in the user's home.
    shown = run(*script, "--out", tmp_path / "out", folder=tmp_path, HOME=str(tmp_path))
    assert "'ranks': 2, 'step': 3, 'loss': 5." in shown
    assert (tmp_path / "out/checkpoints/latest").read_text().strip() == "global_step3"

"""`zeroxide run`: what is started, in which every Python finds zeroxide as deepspeed."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

import zeroxide
from zeroxide.cli.run import check_startup, command_line
from zeroxide.errors import ConfigError

PACKAGE = Path(zeroxide.__file__).parents[1]
SHOWN = "import deepspeed, sys; print(deepspeed.__version__, *sys.argv[1:])"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "zeroxide.cli", "run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_script_gets_its_arguments_and_its_status(tmp_path: Path):
    """Catches: an option of the script taken for one of the command, and a lost exit status."""
    (tmp_path / "train.py").write_text(f"{SHOWN}\nsys.exit(3)\n")
    ended = run("train.py", "--ranks", "7", "-m", "x", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (3, "0.19.8+zeroxide --ranks 7 -m x\n")
    assert "train.py --ranks 7 -m x" in ended.stderr
    ended = run("-m", "train", "a", folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (3, "0.19.8+zeroxide a\n")


def test_ranks(tmp_path: Path):
    """Catches: a variable that torchrun's workers do not get."""
    text = "import deepspeed, os; print(f'{deepspeed.__version__} {os.environ[\"RANK\"]}\\n', end='', flush=True)"
    (tmp_path / "train.py").write_text(text)
    ended = run("--ranks", "2", "train.py", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split("\n")) == ["", "0.19.8+zeroxide 0", "0.19.8+zeroxide 1"]


def test_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches: a program taken for a script, a script for a program, and words that are lost."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch(mode=0o755)
    (tmp_path / "script").touch(mode=0o644)
    (tmp_path / "tool").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line(["train.py", "-x"], None) == [sys.executable, "train.py", "-x"]
    assert command_line(["script"], None) == [sys.executable, "script"]
    assert command_line(["-m", "a.b", "c"], None) == [sys.executable, "-m", "a.b", "c"]
    assert command_line(["tool", "train.py"], None) == [str(tmp_path / "tool"), "train.py"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert command_line(["train.py", "x"], 4) == [*torchrun, "train.py", "x"]
    assert command_line(["-m", "a.b"], 4) == [*torchrun, "-m", "a.b"]


@pytest.mark.parametrize(
    ("command", "ranks", "line"),
    [
        (["gone.py"], None, "gone.py: no such script in "),
        (["gone"], None, "gone: neither a script nor a program on PATH"),
        (["-m"], None, "-m: expected the name of a module after it"),
        (["true"], 2, "--ranks starts scripts, and true is a program"),
    ],
)
def test_what_cannot_be_started(command: list[str], ranks: int | None, line: str):
    with pytest.raises(ConfigError, match=line):
        command_line(command, ranks)


def test_a_python_that_would_not_hear_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Catches: a script that starts with the wrong deepspeed, or none."""
    check_startup()
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"zeroxide.pth, .* install zeroxide's wheel"):
        check_startup()

"""Runs a script of this folder under `zeroxide run`, as a user would, and returns what it has written of its cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import zeroxide

HERE = Path(__file__).parent
PACKAGE = Path(zeroxide.__file__).parents[1]


def run_cases(program: str, folder: Path, cases: list[Any], *options: str) -> Any:
    modules = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "zeroxide.cli", "run", *options),
            *(HERE / program, folder, json.dumps(cases)),
        ],
        env={**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())

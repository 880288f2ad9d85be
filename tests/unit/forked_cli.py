"""`zeroxide` as a command, in processes forked from one that has imported torch and transformers.

finished = run_cli("train", "--model", "tiny")
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from forking import ForkServer

import zeroxide

TESTS = Path(__file__).parents[1]
PACKAGE = Path(zeroxide.__file__).parents[1]
IMPORTS = (
    "transformers.activations",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "tokenizers",
    "typer",
    "rich.console",
)


PROGRAM = "import sys\nfrom zeroxide.cli import main\nsys.exit(main())\n"


@dataclass(frozen=True)
class Finished:
    """How a command ended, as `subprocess.CompletedProcess` tells it."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def server() -> ForkServer:
    """The process that all commands of this session are forked from."""
    return ForkServer(IMPORTS, quiet=True)


def run_cli(*arguments: object) -> Finished:
    """What `python -m zeroxide.cli ARGUMENTS` does; raises `subprocess.TimeoutExpired` after four minutes."""
    modules = [str(PACKAGE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="zeroxide-cli-") as folder:
        program, out, err = (Path(folder, name) for name in ("zeroxide", "out", "err"))
        program.write_text(PROGRAM)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(modules)}
        process = server().fork(program, list(map(str, arguments)), env, out, err)
        try:
            return Finished(process.wait(240), out.read_text(), err.read_text())
        finally:
            process.kill()

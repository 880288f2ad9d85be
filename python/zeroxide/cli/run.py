"""`zeroxide run`: a script for DeepSpeed, unchanged."""

from __future__ import annotations

import os
import shlex
import shutil
import site
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from zeroxide.errors import ConfigError

__all__ = ["run"]

VARIABLE = "ZEROXIDE_AS_DEEPSPEED"
"""Set to 1, `import deepspeed` finds zeroxide in every Python that is started with it (`zeroxide.pth`)."""
STARTUP = "zeroxide.pth"


def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A script, -m MODULE, or a program such as torchrun; then its own arguments."),
    ],
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Start the script with this many ranks, by torchrun.")
    ] = None,
) -> NoReturn:
    """Start a script in which `import deepspeed` finds zeroxide, also in the processes that it starts."""
    check_startup()
    arguments = command_line(command, ranks)
    print(f"zeroxide: deepspeed is zeroxide in: {shlex.join(arguments)}", file=sys.stderr, flush=True)
    os.execve(arguments[0], arguments, {**os.environ, VARIABLE: "1"})


def check_startup() -> None:
    """Raises ConfigError where Python would not read `zeroxide.pth` when it starts."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    if not any((Path(folder) / STARTUP).is_file() for folder in folders):
        raise ConfigError(
            f"{STARTUP}, by which a new Python finds zeroxide under that name, is in none of {', '.join(folders)}: "
            "install zeroxide's wheel for this Python, or make `import zeroxide.integrations.deepspeed` the first line "
            "of the script"
        )


def command_line(command: list[str], ranks: int | None) -> list[str]:
    """What is run for the words of a command, the program's path first. Raises ConfigError where there is none."""
    first, *rest = command
    if first == "-m":
        if not rest:
            raise ConfigError("-m: expected the name of a module after it", path="-m")
        words = ["-m", *rest]
    elif Path(first).is_file() and not os.access(first, os.X_OK):
        words = command
    elif first.endswith(".py"):
        if not Path(first).is_file():
            raise ConfigError(f"{first}: no such script in {Path.cwd()}", path="command", got=first)
        words = command
    else:
        program = shutil.which(first)
        if program is None:
            raise ConfigError(f"{first}: neither a script nor a program on PATH", path="command", got=first)
        if ranks is not None:
            raise ConfigError(f"--ranks starts scripts, and {first} is a program: tell it how many", path="--ranks")
        return [program, *rest]
    if ranks is not None:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = [*start, *words]
    return [sys.executable, *words]

"""`zeroxide run`: a script for DeepSpeed, unchanged; also the torchrun commands that start it on several hosts."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import site
import sys
from pathlib import Path
from typing import Annotated

import typer

from zeroxide.cli.launching.hostfile import commands, is_here, read_hosts
from zeroxide.errors import ConfigError

__all__ = ["run"]

VARIABLE = "ZEROXIDE_AS_DEEPSPEED"
"""Set to 1, `import deepspeed` finds zeroxide in every Python that is started with it (`zeroxide.pth`)."""
STARTUP = "zeroxide.pth"

_TORCHRUN = ["-m", "torch.distributed.run"]
_PORT = 29500


def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A script, -m MODULE, or a program such as torchrun; then its own arguments."),
    ],
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Start the script with this many ranks, by torchrun.")
    ] = None,
    hostfile: Annotated[
        str | None,
        typer.Option(help='Hosts, "NAME slots=RANKS" a line: print the command of each and run that of this host.'),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help=f"With --hostfile: where rank 0 is met, on the first host. Default: {_PORT}.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Start a script in which `import deepspeed` finds zeroxide, also in the processes that it starts."""
    if as_json and not dry_run:
        raise ConfigError("--json is for --dry-run: what a script prints is its own", path="--json")
    if hostfile is None:
        if port is not None:
            raise ConfigError(
                f"--port {port} is for --hostfile: --ranks starts ranks of one host, who meet at a port that is free",
                path="--port",
            )
        _start(command_line(command, ranks), dry_run=dry_run, as_json=as_json)
        return
    if ranks is not None:
        raise ConfigError("--ranks and --hostfile: the file says how many; leave --ranks out", path="--ranks")
    words = _script(command)
    if words is None:
        raise ConfigError(f"--hostfile starts scripts, and {command[0]} is a program", path="--hostfile")
    hosts = read_hosts(hostfile)
    lines = commands(hosts, words, _PORT if port is None else port)
    here = [number for number, host in enumerate(hosts) if is_here(host.name)]
    if as_json:
        rows = zip(hosts, lines, strict=True)
        found = [{"host": host.name, "ranks": host.slots, "command": line} for host, line in rows]
        print(json.dumps({"hosts": found, "here": [hosts[number].name for number in here]}, indent=1))
        return
    for number, (host, line) in enumerate(zip(hosts, lines, strict=True)):
        mark = "  # this host" if number in here else ""
        print(f"{host.name}: {VARIABLE}=1 {shlex.join(line)}{mark}", flush=True)
    if dry_run:
        return
    if len(here) != 1:
        names = ", ".join(hosts[number].name for number in here) or "none of them"
        raise ConfigError(
            f"--hostfile {hostfile}: this host is {names}; run the line of each host there, by ssh or a job's script",
            path="--hostfile",
            expected="one line of this host",
            got=names,
        )
    _start([sys.executable, *_TORCHRUN, *lines[here[0]][1:]], dry_run=False, as_json=False)


def _start(arguments: list[str], *, dry_run: bool, as_json: bool) -> None:
    """Becomes the program that `arguments` name."""
    if as_json:
        print(json.dumps({"command": arguments, "environment": {VARIABLE: "1"}}, indent=1))
    elif dry_run:
        print(f"{VARIABLE}=1 {shlex.join(arguments)}")
    else:
        check_startup()
        print(f"zeroxide: deepspeed is zeroxide in: {shlex.join(arguments)}", file=sys.stderr, flush=True)
        try:
            os.execve(arguments[0], arguments, {**os.environ, VARIABLE: "1"})
        except OSError as error:
            raise ConfigError(_why_not(arguments[0], error), path="command", got=arguments[0]) from None


def _why_not(program: str, error: OSError) -> str:
    """Why the operating system does not start a program, and what to do."""
    reason = f"{program} cannot be started: {error.strerror}"
    if error.errno == errno.ENOEXEC:
        return f"{reason}: a script needs a first line such as #!/bin/bash, or its shell before it: bash {program}"
    if error.errno == errno.ENOENT and Path(program).exists():
        return f"{reason}: what its first line (#!) or its own header asks for is missing"
    return reason


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
    words = _script(command)
    if words is None:
        first, *rest = command
        program = shutil.which(first)
        if program is None:
            raise ConfigError(f"{first}: neither a script nor a program on PATH", path="command", got=first)
        if ranks is not None:
            raise ConfigError(f"--ranks starts scripts, and {first} is a program: tell it how many", path="--ranks")
        return [program, *rest]
    if ranks is not None:
        words = [*_TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", *words]
    return [sys.executable, *words]


def _script(command: list[str]) -> list[str] | None:
    """What Python is given for a script or a module; None where the command is a program."""
    first, *rest = command
    try:
        is_file = Path(first).is_file()
    except OSError as error:
        raise ConfigError(f"{first[:80]}: {error.strerror}", path="command", got=first) from None
    if first == "-m":
        if not rest:
            raise ConfigError("-m: expected the name of a module after it", path="-m")
        return command
    if is_file and not os.access(first, os.X_OK):
        return command
    if first.endswith(".py"):
        if not is_file:
            raise ConfigError(f"{first}: no such script in {Path.cwd()}", path="command", got=first)
        return command
    return None

"""Hosts and how many ranks each has, as DeepSpeed and MPI launchers write them: `worker-1 slots=4` a line."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroxide.errors import ConfigError

__all__ = ["Host", "commands", "is_here", "read_hosts"]

_LINE = re.compile(r"(?P<name>[^\s=#]+)\s+slots\s*=\s*(?P<slots>[0-9]{1,6})")


@dataclass(frozen=True)
class Host:
    """A host by name or address, and the ranks on it."""

    name: str
    slots: int


def read_hosts(path: str) -> list[Host]:
    """The hosts of a file, in its order; `#` begins a comment. Raises ConfigError with the line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"--hostfile {path}: {reason}", path="--hostfile") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match["slots"]) == 0:
            raise ConfigError(
                f'--hostfile {path}:{number}: expected a host and its ranks, such as "worker-1 slots=4", got {text!r}',
                path="--hostfile",
                expected="NAME slots=COUNT",
                got=text,
            )
        if match["name"] in hosts:
            raise ConfigError(f"--hostfile {path}:{number}: {match['name']} stands there twice", path="--hostfile")
        hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: no host in it", path="--hostfile")
    return list(hosts.values())


def commands(hosts: Sequence[Host], words: Sequence[str], port: int) -> list[list[str]]:
    """What starts the ranks of each host: torchrun, with rank 0 on the first. `words` are a script, or -m MODULE."""
    begin = [f"--nnodes={len(hosts)}", f"--master-addr={hosts[0].name}", f"--master-port={port}"]
    return [
        ["torchrun", *begin, f"--node-rank={number}", f"--nproc-per-node={host.slots}", *words]
        for number, host in enumerate(hosts)
    ]


def is_here(name: str) -> bool:
    """Whether a host's name or address is this machine's: a socket can be bound to what it resolves to."""
    own = socket.gethostname()
    if name in (own, own.partition(".")[0], socket.getfqdn()):
        return True
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False

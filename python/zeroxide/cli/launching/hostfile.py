"""Hosts and how many ranks each has, as DeepSpeed and MPI launchers write them: `worker-1 slots=4` a line."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zeroxide.errors import ConfigError

__all__ = ["Host", "commands", "is_here", "read_hosts"]

_LINE = re.compile(r"(?P<name>[^\s=#]+)\s+slots\s*=\s*(?P<slots>[0-9]{1,6})")
_LONGEST_NAME = 253
"""Characters in the name of a host (RFC 1035, section 2.3.4: 255 bytes with the lengths of its parts)."""
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
"""What the hosts files of distributions call the loopback network, beside RFC 6761's names below "localhost"."""


@dataclass(frozen=True)
class Host:
    """A host by name or address, and the ranks on it."""

    name: str
    slots: int


def read_hosts(path: str) -> list[Host]:
    """The hosts of a file, in its order; `#` begins a comment.

    Raises ConfigError for a line that is none, and for a host among several that is another one on each of them.
    """
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
        _check_name(match["name"], f"--hostfile {path}:{number}")
        if match["name"] in hosts:
            raise ConfigError(f"--hostfile {path}:{number}: {match['name']} stands there twice", path="--hostfile")
        hosts[match["name"]] = Host(match["name"], int(match["slots"]))
    if not hosts:
        raise ConfigError(f"--hostfile {path}: no host in it", path="--hostfile")
    loopback = [name for name in hosts if _is_loopback(name)]
    if len(hosts) > 1 and loopback:
        raise ConfigError(
            f"--hostfile {path}: {loopback[0]} is another host on each of the {len(hosts)}: give it the name or "
            "address by which the others reach it",
            path="--hostfile",
            expected="a name that is the same host everywhere",
            got=loopback[0],
        )
    return list(hosts.values())


def _check_name(name: str, where: str) -> None:
    """Raises ConfigError for what no resolver can be asked for."""
    try:
        known = name.isprintable() and len(name.encode("idna")) <= _LONGEST_NAME
    except UnicodeError:
        known = False
    if not known:
        expected = f"parts of 1 to 63 characters between dots, {_LONGEST_NAME} in all"
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise ConfigError(
            f"{where}: {shown!r} is no name of a host: expected {expected}",
            path="--hostfile",
            expected=expected,
            got=name,
        )


def _is_loopback(name: str) -> bool:
    """Whether a name or address means the host that asks, whichever that is.

    Names are told as they stand: some systems give a host's own name an address of the loopback network.
    """
    bare = name.rstrip(".").lower()
    if bare in _LOOPBACK_NAMES or bare.endswith(".localhost"):
        return True
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    with contextlib.suppress(OSError, ValueError):
        # As resolvers read them, "127.1" among others.
        address = ipaddress.IPv4Address(socket.inet_aton(name))
    with contextlib.suppress(ValueError):
        written = ipaddress.IPv6Address(name)
        address = written.ipv4_mapped or written
    return address is not None and (address.is_loopback or address.is_unspecified)


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
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False

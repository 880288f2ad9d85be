"""Where rank 0 lets the other ranks' connections in, and what a stranger may cost it: little.

Whoever can reach the port may connect. Until a connection has shown the token it may send one frame of fixed size, has
a few seconds for it, and only a few such connections are kept. Nothing that it sends is parsed but that frame.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import ipaddress
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from zeroxide.errors import RanksError

__all__ = ["TOKEN_BYTES", "Door", "Stranger", "introduction", "listen", "store_host"]

TOKEN_BYTES = 32
_FRAME = struct.Struct(f"!8s{TOKEN_BYTES}sI")
_MAGIC = b"zeroxide"

_SECONDS = 5.0
"""How long a connection may take to show the token."""
_MOST_STRANGERS = 8
"""How many may be about to do so at once, beside the ranks that are expected; the oldest gives way."""
_MOST_AT_ONCE = 64
"""Connections taken in a row before the door rests."""
_REST = 0.1
"""Seconds of that rest."""
_LONG_REST = 1.0
"""Seconds that the door rests when the process has no descriptors left: what it does otherwise needs them more."""

_SIOCGIFADDR = 0x8915


def introduction(token: bytes, rank: int) -> bytes:
    """What a rank sends first: who it is, and the token that proves it."""
    return _FRAME.pack(_MAGIC, token, rank)


class Stranger:
    """A connection that has not shown the token."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.socket = sock
        self.since = now
        self.received = b""


class Door:
    """Takes connections of `expected` ranks from `listener`, which is non-blocking.

    Its sockets are registered in `selector`: the listener with the door itself as data, a stranger's with the
    `Stranger`. Times are those of `time.monotonic`.
    """

    def __init__(self, listener: socket.socket, token: bytes, expected: int, selector: selectors.BaseSelector) -> None:
        self.expected = expected
        """Ranks that have not come yet. Once all have, whoever connects is turned away at once."""
        self.strangers: list[Stranger] = []
        self._listener = listener
        self._token = token
        self._selector = selector
        self._rests_until: float | None = None
        selector.register(listener, selectors.EVENT_READ, self)

    def accept(self) -> Iterator[Stranger]:
        """Takes those who wait at the door, each to be heard at once: what it says may be there already."""
        now = time.monotonic()
        for _ in range(_MOST_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # has left again
                continue
            except OSError:
                while self.strangers:
                    self.turn_away(self.strangers[0])
                self._rest(now + _LONG_REST)
                return
            if self.expected <= 0:
                sock.close()
                continue
            if len(self.strangers) >= _MOST_STRANGERS + self.expected:
                self.turn_away(self.strangers[0])
            sock.setblocking(False)
            stranger = Stranger(sock, now)
            self.strangers.append(stranger)
            self._selector.register(sock, selectors.EVENT_READ, stranger)
            yield stranger
        self._rest(now + _REST)

    def hear(self, stranger: Stranger) -> int | None:
        """The rank that the stranger has proved to be; it is none any more, and its socket the caller's.

        None while the frame is not complete, and for one who is turned away.
        """
        if stranger not in self.strangers:
            return None
        try:
            piece = stranger.socket.recv(_FRAME.size - len(stranger.received))
        except BlockingIOError:
            return None
        except OSError:
            piece = b""
        stranger.received += piece
        if piece and len(stranger.received) < _FRAME.size:
            return None
        if piece:
            magic, token, rank = _FRAME.unpack(stranger.received)
            if hmac.compare_digest(token, self._token) and magic == _MAGIC:
                self._forget(stranger)
                return int(rank)
        self.turn_away(stranger)
        return None

    def pass_time(self) -> None:
        """Turns away who has been silent for too long, and ends the door's rest."""
        now = time.monotonic()
        longest = _SECONDS if self.expected > 0 else 0.0
        for stranger in [each for each in self.strangers if now - each.since > longest]:
            self.turn_away(stranger)
        if self._rests_until is not None and now >= self._rests_until:
            self._rests_until = None
            self._selector.register(self._listener, selectors.EVENT_READ, self)

    def turn_away(self, stranger: Stranger) -> None:
        """Closes the connection."""
        self._forget(stranger)
        stranger.socket.close()

    def _forget(self, stranger: Stranger) -> None:
        self.strangers.remove(stranger)
        self._selector.unregister(stranger.socket)

    def _rest(self, until: float) -> None:
        if self._rests_until is None:
            self._selector.unregister(self._listener)
        self._rests_until = until

    def close(self) -> None:
        """Closes the listener and the strangers' sockets; the selector may be closed already."""
        self._listener.close()
        for stranger in self.strangers:
            stranger.socket.close()
        self.strangers.clear()


# Where it is ---------------------------------------------------------------------------------------------------------


def listen(loopback: bool) -> tuple[socket.socket, list[str]]:
    """A non-blocking listener on a free port of one interface, and the names under which others may reach it.

    loopback: whether 127.0.0.1 is the same interface to all ranks. Otherwise it is the interface that the process group
    uses, as far as torch and the system tell: the one that GLOO_SOCKET_IFNAME names, the one of torch's store, the one
    of this host's name, the one of the default route.

    Raises RanksError when there is none.
    """
    tried: list[str] = []
    for address in ["127.0.0.1"] if loopback else _addresses():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            sock = socket.create_server((address, 0), family=family, backlog=1024)
        except OSError as error:  # another host's address
            tried.append(f"{address}: {error.strerror}")
            continue
        sock.setblocking(False)
        return sock, [address]
    raise RanksError(
        "rank 0 finds no network interface that the other hosts' ranks could reach it by "
        f"({', '.join(tried) or 'no address is known'}); set GLOO_SOCKET_IFNAME to the name of the one to use",
        ranks=[0],
    )


def store_host() -> list[str]:
    """The name under which torch's store is reached, if it lies on a host. torch tells it in private only."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        return [str(store.host)]
    except (ImportError, AttributeError, ValueError, RuntimeError):
        return []


def _addresses() -> Iterator[str]:
    """Addresses that may be this host's, and by which other hosts may reach it, the likeliest first."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    for name in filter(None, (each.strip() for each in names)):
        address = _interface_address(name)
        if address is not None:
            yield address
    for host in store_host():
        # A host often knows its own name by a loopback address; who gives one as such means it.
        literal = host == "localhost" or _is_loopback(host)
        yield from (each for each in _resolve(host) if literal or not _is_loopback(each))
    yield from (each for each in _resolve(socket.gethostname()) if not _is_loopback(each))
    # Connecting a datagram socket sends nothing, it only chooses the route; the second is an address for documentation.
    for host in [*store_host(), "192.0.2.1"]:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = str(probe.getsockname()[0])
            if not _is_loopback(address):
                yield address


def _interface_address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _resolve(host: str) -> list[str]:
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(info[4][0]) for info in found))
    return []


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False

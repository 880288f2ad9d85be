"""One TCP connection between two ranks' watches: JSON objects, one a line, never blocking.

torch's store is not used for this: a call on it blocks without limit while the process that hosts it is stopped, and
its errors print C++ stacks.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

__all__ = ["Wire", "connect", "listen", "own_addresses"]

_MOST_BYTES = 1 << 16
"""Longest line, and most that waits to be sent; a peer that does not read loses what is beyond."""


class Wire:
    """A connected socket, as lines."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._received = b""
        self._unsent = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends as much as the system takes at once; the rest goes with the next call."""
        line = json.dumps(message).encode() + b"\n"
        if len(self._unsent) + len(line) <= _MOST_BYTES:
            self._unsent += line
        self.flush()

    def flush(self) -> None:
        """Sends what is left over. A connection that has broken shows when it is read."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = b""

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages that have arrived, and whether the connection still stands."""
        open_, lines = True, []
        try:
            while open_:
                piece = self.socket.recv(_MOST_BYTES)
                *complete, self._received = (self._received + piece).split(b"\n")
                lines += complete
                open_ = bool(piece) and len(self._received) <= _MOST_BYTES
        except BlockingIOError:
            open_ = True
        except OSError:
            open_ = False
        messages: list[dict[str, Any]] = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                return messages, False
            if not isinstance(message, dict):
                return messages, False
            messages.append(message)
        return messages, open_

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()


def listen(same_host: bool) -> socket.socket:
    """A socket on a free port, on 127.0.0.1 alone where all ranks are on this host."""
    if same_host:
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    elif socket.has_dualstack_ipv6():
        sock = socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    else:
        sock = socket.create_server(("", 0), backlog=1024)
    sock.setblocking(False)
    return sock


def own_addresses(same_host: bool) -> list[str]:
    """Names under which other ranks may reach this host, to be tried in this order."""
    if same_host:
        return ["127.0.0.1"]
    names = [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    # A host often knows itself by a loopback address, which is another host to everybody else.
    return [each for each in dict.fromkeys(names) if not each.startswith("127.") and each != "::1"]


def connect(addresses: list[str], port: int, seconds: float) -> Wire | str:
    """A connection to the first address that takes one within `seconds`, else what each of them said."""
    said: list[str] = []
    for address in addresses:
        try:
            return Wire(socket.create_connection((address, port), timeout=seconds))
        except OSError as error:
            said.append(f"{address}:{port}: {error}")
    return ", ".join(said)

"""One TCP connection between two ranks' watches: JSON objects, one a line, never blocking.

torch's store is not used for this: a call on it blocks without limit while the process that hosts it is stopped, and
its errors print C++ stacks.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

__all__ = ["Connection", "connect"]

_MOST_BYTES = 1 << 16
"""Longest line, and most that waits to be sent; a peer that does not read loses what is beyond."""
_MOST_AT_ONCE = 4 * _MOST_BYTES
"""Most that one call of `receive` takes: a peer that writes without end gets no more attention than the others."""
_MOST_BRACKETS = 4
"""A message is an object that holds at most one list. More could make the parser recurse."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)


class Connection:
    """A connected socket, as lines."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self._received = b""
        self._unsent = b""

    def introduce(self, frame: bytes) -> None:
        """Sends what the peer expects before any message."""
        self._unsent += frame
        self.flush()

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
        open_, lines, taken = True, [], 0
        try:
            while open_ and taken < _MOST_AT_ONCE:
                piece = self.socket.recv(_MOST_BYTES)
                *complete, self._received = (self._received + piece).split(b"\n")
                lines += complete
                taken += len(piece)
                open_ = bool(piece) and len(self._received) <= _MOST_BYTES
        except BlockingIOError:
            open_ = True
        except OSError:
            open_ = False
        messages: list[dict[str, Any]] = []
        for line in lines:
            message = _parse(line)
            if message is None:
                return messages, False
            messages.append(message)
        return messages, open_

    def close(self) -> None:
        """Closes the socket."""
        self.socket.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The message in a line, None if it is none."""
    try:
        text = line.decode()
        bare = _STRING.sub("", text)
        message = json.loads(text) if bare.count("[") + bare.count("{") <= _MOST_BRACKETS else None
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def connect(addresses: list[str], port: int, seconds: float) -> Connection | str:
    """A connection to the first address that takes one within `seconds`, else what each of them said."""
    said: list[str] = []
    for address in addresses:
        try:
            return Connection(socket.create_connection((address, port), timeout=seconds))
        except OSError as error:
            said.append(f"{address}:{port}: {error}")
    return ", ".join(said)

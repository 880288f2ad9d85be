"""The two ends of the watch: `Coordinator` in rank 0 hears everybody and judges; `Worker`, elsewhere, reports and is
told.

A star, since one place then knows what every rank does, and a killed process closes its connection at once. Rank 0
handles one short line per rank and second. Both ends have the same methods, called by the watch's thread alone.
"""

from __future__ import annotations

import selectors
import socket
import threading
from typing import Any, Protocol

from zeroxide.distributed.health.activity import Activity, Failure, as_doing
from zeroxide.distributed.health.connection import Connection
from zeroxide.distributed.health.door import Door, Stranger, introduction
from zeroxide.distributed.health.failure_detector import FailureDetector

__all__ = ["Coordinator", "Endpoint", "Worker"]


class Endpoint(Protocol):
    """What the watch's thread does with its end."""

    def wait(self, seconds: float) -> None:
        """Handles what has arrived; returns at the latest after `seconds`, or when `wake` is called."""

    def wake(self) -> None:
        """Ends `wait` early. May be called from any thread."""

    def beat(self, activity: Activity) -> None:
        """Tells the other side that this rank lives, and what it does."""

    def detect(self, seconds: float, activity: Activity) -> Failure | None:
        """The reason to end, if there is one, after `seconds` more of listening."""

    def look(self) -> None:
        """Asks the system after ranks of this host."""

    def say_failed(self, line: str) -> None:
        """Tells the others why this rank fails."""

    def say_finished(self) -> None:
        """Tells the others that this rank leaves of its own accord."""

    def close(self) -> None:
        """Closes every socket."""


class _Waker:
    """A selector that another thread can interrupt."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)
        self.selector.register(self._inside, selectors.EVENT_READ, None)

    def wake(self) -> None:
        try:
            self._outside.send(b"w")
        except OSError:  # full: it will wake anyway; closed: nobody waits
            return

    def select(self, seconds: float) -> list[Any]:
        """The data of the sockets that are ready to be read."""
        ready = []
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self._inside:
                self._inside.recv(4096)
            else:
                ready.append(key.data)
        return ready

    def close(self) -> None:
        self.selector.close()
        self._inside.close()
        self._outside.close()


_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError)
"""What taking a message raises that is none of this protocol's."""


class _Visitor:
    """A connection to the coordinator, of a rank that has shown the token."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self.connection = connection
        self.rank = rank


class Coordinator:
    """Rank 0's end. `listener` is non-blocking; `token` is what the other ranks show when they connect."""

    def __init__(self, detector: FailureDetector, listener: socket.socket, token: bytes) -> None:
        self._detector = detector
        self._listener = listener
        self._waker = _Waker()
        self._door = Door(listener, token, len(detector.members) - 1, self._waker.selector)
        self._visitors: list[_Visitor] = []
        self._arrived = {0}
        self.complete = threading.Event()
        """Set once every rank has connected: before that rank 0 cannot tell them that it has finished."""

    def wait(self, seconds: float) -> None:
        """See `Endpoint`."""
        for ready in self._waker.select(seconds):
            if ready is self._door:
                for stranger in self._door.accept():
                    self._admit(stranger)
            elif isinstance(ready, Stranger):
                self._admit(ready)
            else:
                self._hear(ready)
        self._door.pass_time()

    def _admit(self, stranger: Stranger) -> None:
        rank = self._door.hear(stranger)
        if rank is None:
            return
        if rank not in self._detector.members or rank in self._arrived:
            stranger.socket.close()
            return
        visitor = _Visitor(Connection(stranger.socket), rank)
        self._visitors.append(visitor)
        self._waker.selector.register(stranger.socket, selectors.EVENT_READ, visitor)
        self._arrived.add(rank)
        self._door.expected -= 1
        if not self._door.expected:
            self.complete.set()

    def _hear(self, visitor: _Visitor) -> None:
        messages, stands = visitor.connection.receive()
        try:
            for message in messages:
                self._take(visitor, message)
        except _MALFORMED:
            stands = False
        if not stands:
            self._waker.selector.unregister(visitor.connection.socket)
            visitor.connection.close()
            self._visitors.remove(visitor)
            self._detector.gone(visitor.rank)

    def _take(self, visitor: _Visitor, message: dict[str, Any]) -> None:
        if "doing" in message:
            self._detector.heard(visitor.rank, Activity(as_doing(message["doing"]), float(message["seconds"])))
        elif "failed" in message:
            self._detector.failed(visitor.rank, str(message["failed"]))
        elif "finished" in message:
            self._detector.finished(visitor.rank)

    def wake(self) -> None:
        """See `Endpoint`."""
        self._waker.wake()

    def beat(self, activity: Activity) -> None:
        """See `Endpoint`. The other ranks also get what all the ranks do, to print it should rank 0 be lost."""
        self._detector.heard(0, activity)
        self._tell({"doing": activity.doing, "seconds": activity.seconds, "others": self._detector.others([0])})

    def detect(self, seconds: float, activity: Activity) -> Failure | None:
        """See `Endpoint`. Everybody hears the failure before this rank acts on it."""
        self._detector.heard(0, activity)
        for visitor in self._visitors:
            visitor.connection.flush()
        failure = self._detector.pass_time(seconds)
        if failure is not None:
            self._tell({"failure": failure.line, "ranks": failure.ranks})
        return failure

    def look(self) -> None:
        """See `Endpoint`."""
        self._detector.look()

    def say_failed(self, line: str) -> None:
        """See `Endpoint`. The others hear of it with the failure."""
        self._detector.failed(0, line)

    def say_finished(self) -> None:
        """See `Endpoint`."""
        self._tell({"finished": True})

    def _tell(self, message: dict[str, Any]) -> None:
        for visitor in self._visitors:
            visitor.connection.send(message)

    def close(self) -> None:
        """See `Endpoint`."""
        self._waker.close()
        self._door.close()
        for visitor in self._visitors:
            visitor.connection.close()


class Worker:
    """The end of every rank but 0. `detector` knows this rank and rank 0; the failure on others comes from rank 0."""

    def __init__(self, detector: FailureDetector, connection: Connection, rank: int, token: bytes) -> None:
        self._detector = detector
        self._connection = connection
        self._rank = rank
        self._waker = _Waker()
        self._waker.selector.register(connection.socket, selectors.EVENT_READ, "connection")
        self._connected = True
        self._failure: Failure | None = None
        connection.introduce(introduction(token, rank))

    def wait(self, seconds: float) -> None:
        """See `Endpoint`."""
        if self._waker.select(seconds) and self._connected:
            self._hear()

    def _hear(self) -> None:
        messages, stands = self._connection.receive()
        try:
            for message in messages:
                self._take(message)
        except _MALFORMED:
            stands = False
        if not stands:
            self._connected = False
            self._waker.selector.unregister(self._connection.socket)
            self._detector.gone(0)

    def _take(self, message: dict[str, Any]) -> None:
        if "failure" in message and self._failure is None:
            self._failure = Failure(str(message["failure"]), tuple(int(each) for each in message["ranks"]))
        elif "doing" in message:
            self._detector.heard(0, Activity(as_doing(message["doing"]), float(message["seconds"])))
            self._detector.told = str(message["others"])
        elif "finished" in message:
            self._detector.finished(0)

    def wake(self) -> None:
        """See `Endpoint`."""
        self._waker.wake()

    def beat(self, activity: Activity) -> None:
        """See `Endpoint`."""
        self._connection.send({"doing": activity.doing, "seconds": round(activity.seconds, 3)})

    def detect(self, seconds: float, activity: Activity) -> Failure | None:
        """See `Endpoint`."""
        self._detector.heard(self._rank, activity)
        if self._connected:
            self._connection.flush()
        return self._failure or self._detector.pass_time(seconds)

    def look(self) -> None:
        """See `Endpoint`."""
        self._detector.look()

    def say_failed(self, line: str) -> None:
        """See `Endpoint`."""
        self._connection.send({"failed": line})

    def say_finished(self) -> None:
        """See `Endpoint`."""
        self._connection.send({"finished": True})

    def close(self) -> None:
        """See `Endpoint`."""
        self._waker.close()
        self._connection.close()

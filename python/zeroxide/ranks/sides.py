"""The two ends of the watch: `Hub` in rank 0 hears everybody and judges; `Spoke`, elsewhere, reports and is told.

A star, since one place then knows what every rank does, and a killed process closes its connection at once. Rank 0
handles one short line per rank and second. Both ends have the same methods, called by the watch's thread alone.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import threading
from typing import Any, Protocol

from zeroxide.ranks.activity import Activity, Verdict, as_doing
from zeroxide.ranks.judge import Judge
from zeroxide.ranks.wire import Wire

__all__ = ["Hub", "Side", "Spoke"]


class Side(Protocol):
    """What the watch's thread does with its end."""

    def wait(self, seconds: float) -> None:
        """Handles what has arrived; returns at the latest after `seconds`, or when `wake` is called."""

    def wake(self) -> None:
        """Ends `wait` early. May be called from any thread."""

    def beat(self, activity: Activity) -> None:
        """Tells the other side that this rank lives, and what it does."""

    def judge(self, seconds: float, activity: Activity) -> Verdict | None:
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


class _Visitor:
    """A connection to the hub; `rank` is None until it has shown the token."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.rank: int | None = None


class Hub:
    """Rank 0's end. `listener` is non-blocking; `token` is what the other ranks show when they connect."""

    def __init__(self, judge: Judge, listener: socket.socket, token: str) -> None:
        self._judge = judge
        self._listener = listener
        self._token = token
        self._waker = _Waker()
        self._waker.selector.register(listener, selectors.EVENT_READ, "listener")
        self._visitors: list[_Visitor] = []
        self._arrived = {0}
        self.complete = threading.Event()
        """Set once every rank has connected: before that rank 0 cannot tell them that it has finished."""

    def wait(self, seconds: float) -> None:
        """See `Side`."""
        for ready in self._waker.select(seconds):
            if ready == "listener":
                self._accept()
            else:
                self._hear(ready)

    def _accept(self) -> None:
        try:
            while True:
                sock, _ = self._listener.accept()
                visitor = _Visitor(Wire(sock))
                self._visitors.append(visitor)
                self._waker.selector.register(sock, selectors.EVENT_READ, visitor)
        except OSError:  # nobody else waits at the door
            return

    def _hear(self, visitor: _Visitor) -> None:
        messages, stands = visitor.wire.receive()
        try:
            for message in messages:
                self._take(visitor, message)
        except (KeyError, TypeError, ValueError, PermissionError):
            stands = False  # a stranger, who does not speak this protocol
        if not stands:
            self._waker.selector.unregister(visitor.wire.socket)
            visitor.wire.close()
            self._visitors.remove(visitor)
            if visitor.rank is not None:
                self._judge.gone(visitor.rank)

    def _take(self, visitor: _Visitor, message: dict[str, Any]) -> None:
        if visitor.rank is None:
            if not hmac.compare_digest(str(message["token"]), self._token):
                raise PermissionError
            visitor.rank = int(message["rank"])
            self._arrived.add(visitor.rank)
            if len(self._arrived) == len(self._judge.members):
                self.complete.set()
        elif "doing" in message:
            self._judge.heard(visitor.rank, Activity(as_doing(message["doing"]), float(message["seconds"])))
        elif "failed" in message:
            self._judge.failed(visitor.rank, str(message["failed"]))
        elif "finished" in message:
            self._judge.finished(visitor.rank)

    def wake(self) -> None:
        """See `Side`."""
        self._waker.wake()

    def beat(self, activity: Activity) -> None:
        """See `Side`. The other ranks also get what all the ranks do, to print it should rank 0 be lost."""
        self._judge.heard(0, activity)
        self._tell({"doing": activity.doing, "seconds": activity.seconds, "others": self._judge.others([0])})

    def judge(self, seconds: float, activity: Activity) -> Verdict | None:
        """See `Side`. Everybody hears the verdict before this rank acts on it."""
        self._judge.heard(0, activity)
        for visitor in self._visitors:
            visitor.wire.flush()
        verdict = self._judge.pass_time(seconds)
        if verdict is not None:
            self._tell({"verdict": verdict.line, "ranks": verdict.ranks})
        return verdict

    def look(self) -> None:
        """See `Side`."""
        self._judge.look()

    def say_failed(self, line: str) -> None:
        """See `Side`. The others hear of it with the verdict."""
        self._judge.failed(0, line)

    def say_finished(self) -> None:
        """See `Side`."""
        self._tell({"finished": True})

    def _tell(self, message: dict[str, Any]) -> None:
        for visitor in self._visitors:
            if visitor.rank is not None:
                visitor.wire.send(message)

    def close(self) -> None:
        """See `Side`."""
        self._waker.close()
        self._listener.close()
        for visitor in self._visitors:
            visitor.wire.close()


class Spoke:
    """The end of every rank but 0. `judge` knows this rank and rank 0; the verdict on others comes from rank 0."""

    def __init__(self, judge: Judge, wire: Wire, rank: int, token: str) -> None:
        self._judge = judge
        self._wire = wire
        self._rank = rank
        self._waker = _Waker()
        self._waker.selector.register(wire.socket, selectors.EVENT_READ, "wire")
        self._connected = True
        self._verdict: Verdict | None = None
        wire.send({"token": token, "rank": rank})

    def wait(self, seconds: float) -> None:
        """See `Side`."""
        if self._waker.select(seconds) and self._connected:
            self._hear()

    def _hear(self) -> None:
        messages, stands = self._wire.receive()
        for message in messages:
            if "verdict" in message and self._verdict is None:
                self._verdict = Verdict(str(message["verdict"]), tuple(message["ranks"]))
            elif "doing" in message:
                self._judge.heard(0, Activity(as_doing(message["doing"]), float(message["seconds"])))
                self._judge.told = str(message["others"])
            elif "finished" in message:
                self._judge.finished(0)
        if not stands:
            self._connected = False
            self._waker.selector.unregister(self._wire.socket)
            self._judge.gone(0)

    def wake(self) -> None:
        """See `Side`."""
        self._waker.wake()

    def beat(self, activity: Activity) -> None:
        """See `Side`."""
        self._wire.send({"doing": activity.doing, "seconds": round(activity.seconds, 3)})

    def judge(self, seconds: float, activity: Activity) -> Verdict | None:
        """See `Side`."""
        self._judge.heard(self._rank, activity)
        if self._connected:
            self._wire.flush()
        return self._verdict or self._judge.pass_time(seconds)

    def look(self) -> None:
        """See `Side`."""
        self._judge.look()

    def say_failed(self, line: str) -> None:
        """See `Side`."""
        self._wire.send({"failed": line})

    def say_finished(self) -> None:
        """See `Side`."""
        self._wire.send({"finished": True})

    def close(self) -> None:
        """See `Side`."""
        self._waker.close()
        self._wire.close()

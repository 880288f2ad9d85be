"""Ranks watch one another, so that none waits for a rank that will not come.

A thread in every rank tells rank 0 once a second what its rank is doing, and hears the failure. The main thread says
what it does by assigning `Watch.doing` or inside `Watch.waiting`; it makes no system call for it.

A rank that computes is never ended however long it takes. Over several hosts, though, a rank whose Python lock is held
by one call for longer than `timeout` looks like one that has stopped; on one host the system is asked.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from zeroxide.distributed.collectives import Ranks, first_line
from zeroxide.distributed.health.activity import IDLE, Activity, Doing, Failure, is_waiting
from zeroxide.distributed.health.connection import connect
from zeroxide.distributed.health.door import TOKEN_BYTES, listen, store_host
from zeroxide.distributed.health.endpoint import Coordinator, Endpoint, Worker
from zeroxide.distributed.health.failure_detector import FailureDetector, Member
from zeroxide.distributed.host import Process, host_identity
from zeroxide.errors import RanksError

__all__ = ["EXIT_CODE", "Watch"]

_T = TypeVar("_T")

_MOST_CHATTY = 64
"""Up to so many ranks, each tells within a quarter of the interval when it does something else."""

EXIT_CODE = 75
"""Status of a process that the watch ends: EX_TEMPFAIL of sysexits.h, for the job may succeed when it is run again."""


class Watch:
    """One rank's part in the watch. All ranks make one together; with a single rank it does nothing.

    parts: groups of `ranks` that have collectives of their own, see `split`.
    timeout: seconds without a sign of life, or of all ranks waiting for different things, that count as a failure.
    interval: seconds between two signs of life; at most a tenth of `timeout` is used.
    grace: seconds that the main thread has to leave what it waits in, once the failure is known. After that the
        process prints the line and ends with `EXIT_CODE`.
    cleanup: seconds that a main thread which has been told has to call `close` or to end.

    Used as a context manager, an exception that leaves the block is told to the others.
    Raises RanksError when rank 0 cannot be reached.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        parts: Sequence[Ranks] = (),
        timeout: float = 10.0,
        interval: float = 1.0,
        grace: float = 3.0,
        cleanup: float = 30.0,
    ) -> None:
        self.doing: Doing = IDLE
        """What this rank does: (phase, unit, collective, sequence). With a collective it waits, without it computes."""
        self._ranks = ranks
        self._every = list({id(each): each for each in (ranks, *parts)}.values())
        """The ranks, and the groups of them that must know of a loss as well."""
        self._timeout, self._grace, self._cleanup = timeout, grace, cleanup
        self._interval = min(interval, timeout / 10)
        self._grace = min(0.5, timeout / 4)
        self._count = 0
        self._pid = os.getpid()
        self._failure: Failure | None = None
        self._known = threading.Event()
        self._told = False
        self._own_line: str | None = None
        self._closing = False
        self._callbacks: list[Callable[[str, tuple[int, ...]], object]] = []
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._thread: threading.Thread | None = None
        if ranks.alone:
            return
        self._endpoint = _open(ranks, timeout, self._grace)
        for each in self._every:
            each.explain = self.explain
        self._hook = _chain_excepthook(self)
        self._thread = threading.Thread(target=self._run, name="zeroxide-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        _live.add(self)
        if isinstance(self._endpoint, Coordinator):
            # They are on their way: each has this rank's address.
            self._endpoint.complete.wait(timeout)

    # The main thread's side ------------------------------------------------------------------------------------------

    def waiting(self, collective: str, unit: str | int | None = None, sequence: int | None = None) -> _Waiting:
        """A context in which this rank waits for `collective`, in the phase of `doing`.

        sequence: the collective's number, the same on every rank; None counts the calls. Entering and leaving raise
        RanksError once a failure is known. A RuntimeError that leaves the block, as gloo raises when a peer is gone,
        becomes the RanksError that names the rank, if the watch finds one.
        """
        if sequence is None:
            self._count = sequence = self._count + 1
        return _Waiting(self, (self.doing[0], unit, collective, sequence))

    def wait(self, collective: str, unit: str, call: Callable[..., _T], *arguments: Any) -> _T:
        """`call(*arguments)` in `waiting(collective, unit)`, at half its cost: every unit does so in every pass."""
        if self._failure is not None:
            raise self._error()
        before = self.doing
        self._count = sequence = self._count + 1
        self.doing = (before[0], unit, collective, sequence)
        try:
            found = call(*arguments)
        except (RuntimeError, RanksError) as error:
            self._raise_cause(error, before)
            raise
        finally:
            self.doing = before
        if self._failure is not None:
            raise self._error()
        return found

    def _raise_cause(self, error: BaseException, before: Doing) -> None:
        """Raises the failure behind an error that has left a wait, if there is one. `before`: what came before that."""
        found = self.explain()
        self.doing = before
        if found is not None and found.args != error.args:
            raise found from error

    def on_failure(self, callback: Callable[[str, tuple[int, ...]], object]) -> None:
        """The watch's thread calls `callback(line, ranks)` as soon as a failure is known; at once if one already is."""
        with self._lock:
            self._callbacks.append(callback)
            failure = self._failure
        if failure is not None:
            callback(failure.line, failure.ranks)

    def check(self) -> None:
        """Raises RanksError, naming the rank, if a failure is known."""
        if self._failure is not None:
            raise self._error()

    def explain(self, seconds: float = 2.0) -> RanksError | None:
        """The failure behind a collective that has just failed; waits up to `seconds` for it to be known."""
        if self._thread is None or not self._known.wait(seconds):
            return None
        return self._error()

    def failed(self, line: str) -> None:
        """Tells the others that this rank fails, and why. They end, quoting `line`. Takes about two seconds at most."""
        if self._thread is None or os.getpid() != self._pid or self._closing:
            return
        if self._own_line is None and self._failure is None:
            self._own_line = " ".join(line.split())[:1000]
        self._told = True
        self._wake()
        self._known.wait(self._grace + 1.5)

    def close(self) -> None:
        """Tells the others that this rank has finished, and ends the thread. Calling it again does nothing."""
        if self._thread is None or os.getpid() != self._pid:
            return
        thread, self._thread = self._thread, None
        self._closing = True
        self._wake()
        if thread is not threading.current_thread():
            # A callback may still run in it; it is a daemon and ends with the process at the latest.
            thread.join(5.0)
        for each in self._every:
            each.explain = None
        _live.discard(self)
        atexit.unregister(self.close)
        if sys.excepthook is self._hook[0]:
            sys.excepthook = self._hook[1]

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, RanksError) and self._failure is not None):
            self.failed(_said(error))
        self.close()

    def _error(self) -> RanksError:
        assert self._failure is not None
        self._told = True
        return RanksError(self._failure.line, ranks=self._failure.ranks)

    def _wake(self) -> None:
        if self._endpoint is not None:
            self._endpoint.wake()

    # The thread's side -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            failure = self._listen(endpoint)
            if failure is None:
                endpoint.say_finished()
            else:
                self._fail(failure)
        finally:
            endpoint.close()

    def _listen(self, endpoint: Endpoint) -> Failure | None:
        """Until there is a failure, or None when this rank closes the watch."""
        seen, said = self.doing, False
        last = since = time.monotonic()
        next_beat = last
        while not self._closing:
            now = time.monotonic()
            news = self.doing is not seen
            if news:
                seen, since = self.doing, now
            activity = Activity(seen, now - since)
            if self._own_line is not None and not said:
                said = True
                endpoint.say_failed(self._own_line)
            # A wait that has just become too long is told at once, so that the failure does not wait for the next beat.
            overdue = is_waiting(seen) and last - since <= self._timeout < now - since
            if now >= next_beat:
                next_beat = now + self._interval
                endpoint.beat(activity)
                endpoint.look()
            elif overdue or (news and self._ranks.world <= _MOST_CHATTY):
                endpoint.beat(activity)
            # Time in which this thread did not run, because the process or the machine was halted, is nobody's silence.
            failure = endpoint.detect(min(now - last, self._interval), activity)
            last = now
            if failure is not None:
                return failure
            endpoint.wait(self._interval / 4)
        return None

    def _fail(self, failure: Failure) -> None:
        for each in self._every:
            each.lost = failure.line
        with self._lock:
            self._failure = failure
            callbacks = list(self._callbacks)
        self._known.set()
        atexit.register(_limit_exit, max(self._grace, 3.0))
        for callback in callbacks:
            # A broken callback must not keep this process alive.
            with contextlib.suppress(Exception):
                callback(failure.line, failure.ranks)
        if not self._left_alone(self._grace, lambda: self._told) and not self._closing:
            _end(failure.line)
        if not self._left_alone(self._cleanup, lambda: self._closing):
            _end(failure.line)

    def _left_alone(self, seconds: float, done: Callable[[], bool]) -> bool:
        """Whether the main thread did its part within `seconds`."""
        endpoint = self._endpoint
        assert endpoint is not None
        until = time.monotonic() + seconds
        while not done() and not self._closing:
            if time.monotonic() >= until:
                return False
            time.sleep(min(0.05, seconds))
        return True


class _Waiting:
    """See `Watch.waiting`. A class of its own, since this is entered for every collective."""

    __slots__ = ("_before", "_during", "_watch")

    def __init__(self, watch: Watch, during: Doing) -> None:
        self._watch = watch
        self._during = during

    def __enter__(self) -> None:
        watch = self._watch
        watch.check()
        self._before = watch.doing
        watch.doing = self._during

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch = self._watch
        if isinstance(error, (RuntimeError, RanksError)):
            watch._raise_cause(error, self._before)
        watch.doing = self._before
        if error is None:
            watch.check()


# How the ranks meet --------------------------------------------------------------------------------------------------


def _open(ranks: Ranks, timeout: float, grace: float) -> Endpoint:
    """This rank's end, connected. Rank 0 chooses a port and a token, which the group carries to the others."""
    listener, addresses = listen(ranks.same_network) if ranks.rank == 0 else (None, [])
    try:
        own = Process.current()
        mine: dict[str, Any] = {"host": host_identity(), "pid": own.pid, "started": own.started}
        if listener is not None:
            mine["port"] = listener.getsockname()[1]
            mine["addresses"] = addresses
            mine["token"] = secrets.token_hex(TOKEN_BYTES)
        rows = ranks.gather_objects(mine)
    except BaseException:
        if listener is not None:
            listener.close()
        raise
    members = [Member(rank, row["host"], Process(row["pid"], row["started"])) for rank, row in enumerate(rows)]
    detector = FailureDetector(members, ranks.rank, timeout, grace)
    token = bytes.fromhex(rows[0]["token"])
    if listener is not None:
        return Coordinator(detector, listener, token)
    addresses = list(rows[0]["addresses"])
    if not ranks.same_network:
        # Where addresses are translated, the way on which torch already reaches that host is open.
        addresses = list(dict.fromkeys([*addresses, *store_host()]))
    connection = connect(addresses, int(rows[0]["port"]), timeout)
    if isinstance(connection, str):
        raise RanksError(
            f"rank {ranks.rank} cannot reach rank 0 to watch it: {connection}; open the hosts' ports to one another",
            ranks=[0],
        )
    return Worker(detector, connection, ranks.rank, token)


# How a process ends --------------------------------------------------------------------------------------------------


def _end(line: str) -> None:
    """Prints the line and ends the process, whatever its other threads hold."""
    # Flushing may wait for a lock that the main thread holds, or for a full pipe.
    timer = threading.Timer(1.0, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _print(line)
    os._exit(EXIT_CODE)


def _print(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"zeroxide: error: {line}\n".encode())


def _limit_exit(seconds: float) -> None:
    """Ends the process if the interpreter does not within `seconds`: freeing a group may wait for the lost rank."""
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _chain_excepthook(watch: Watch) -> tuple[Any, Any]:
    """(the new hook, the one before): an exception that ends the program is told to the other ranks."""
    before = sys.excepthook
    reference = weakref.ref(watch)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        watch = reference()
        ours = watch is not None and os.getpid() == watch._pid
        failure = watch._failure if watch is not None and ours else None
        if failure is not None and str(error) == failure.line:
            # Where this rank was when another one was lost explains nothing; the line says it all.
            _print(failure.line)
            return
        before(kind, error, trace)
        if watch is None or not ours:
            return
        watch.failed(_said(error))
        failure = watch._failure
        if failure is not None and watch._ranks.rank not in failure.ranks:
            # What this rank stumbled over was the consequence of another rank's end.
            _print(failure.line)

    sys.excepthook = hook
    return hook, before


_live: weakref.WeakSet[Watch] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child must not keep the connections open, or its parent's end would go unnoticed."""
    for watch in list(_live):
        watch._thread = None
        if watch._endpoint is not None:
            watch._endpoint.close()
    _live.clear()


os.register_at_fork(after_in_child=_forget_in_child)

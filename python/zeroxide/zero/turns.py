"""Threads that take turns: one works at a time, until it hands its turn on."""

from __future__ import annotations

import threading
from contextlib import suppress

__all__ = ["Cancelled", "Turns"]


class Cancelled(BaseException):
    """Ends a thread whose turn will not come again. No `except Exception` of a model's stops it."""


class Turns:
    """The turns of `count` threads, numbered from 0, and of the one that made them, which is None.

    Whoever hands its turn on stands still until it comes back. Exactly one of them works at any moment, so what they
    share needs no other lock.
    """

    def __init__(self, count: int) -> None:
        self.cancelled = False
        """Whether every thread is to end with its next turn."""
        self._gates = [threading.Lock() for _ in range(count)]
        self._back = threading.Event()
        for gate in self._gates:
            gate.acquire()

    def run(self, first: int) -> None:
        """Gives the turn to a thread; returns when it is back. Called by the one that made the threads."""
        self._back.clear()
        self.end(first)
        try:
            self._back.wait()
        except BaseException:
            # An interrupt. The thread at work cannot be stopped; with its next turn it ends.
            self.cancelled = True
            while not self._back.is_set():
                with suppress(KeyboardInterrupt):
                    self._back.wait()
            raise

    def wait(self, number: int) -> None:
        """Stands still until it is the thread's turn. Raises Cancelled."""
        self._gates[number].acquire()
        if self.cancelled:
            raise Cancelled

    def hand_on(self, number: int, to: int | None) -> None:
        """Gives the thread's turn to another, and waits for the next one. Raises Cancelled."""
        if to != number:
            self.end(to)
            self.wait(number)

    def end(self, to: int | None) -> None:
        """Gives the turn away for good."""
        if to is None:
            self._back.set()
        else:
            self._gates[to].release()

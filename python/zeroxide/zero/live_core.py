"""The core of one engine for as long as the engine lives."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

from zeroxide import _core
from zeroxide.zero.detach import end_core
from zeroxide.zero.messages import Messages
from zeroxide.zero.unit import Unit

__all__ = ["LiveCore"]


class LiveCore:
    """The core of an engine: whoever holds this keeps it.

    It ends with the last holder at the latest, and at the end of the process, which may come without `destroy`: scratch
    files are large.
    """

    def __init__(self, core: _core.Offload, messages: Messages) -> None:
        self.messages = messages
        self._core: _core.Offload | None = core
        self._process = os.getpid()
        weakref.finalize(self, end_core, core, messages)

    def __call__(self) -> _core.Offload:
        """The core. Raises RuntimeError once it has ended."""
        if self._core is None:
            raise RuntimeError("the engine was destroyed: make another one with initialize")
        return self._core

    @property
    def alive(self) -> bool:
        """Whether it has not ended, nor been left to another process."""
        return self._core is not None

    def leave_to_parent(self) -> bool:
        """In a forked child, lets go of the core, which is the parent's, and returns True."""
        if os.getpid() == self._process:
            return False
        self._core = None
        return True

    def take(self) -> _core.Offload:
        """The core, for the last time. Raises RuntimeError when it was taken before."""
        core = self()
        self._core = None
        return core

    def end(self, core: _core.Offload, readers: Sequence[Unit]) -> None:
        """Ends `core`, which was taken, after the messages that use its memory.

        readers: units of which somebody has kept views.
        """
        self.messages.drain()
        end_core(core, self.messages, readers)

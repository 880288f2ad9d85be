"""Readers that nothing announced, of weights that lie in parts on several ranks: a thread brings them.

A view of a weight can be read when its unit is not gathered: by autograd, which saved it for a node of another module,
or by whoever kept it. The read faults and waits (`fault.rs`). With one rank the core brings what is missing; here the
other ranks have a part in it, and all of them come to the same read, since they run the same pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from zeroxide import _core
from zeroxide.errors import ModelError, ZeroxideError
from zeroxide.zero.gather.gatherer import Gatherer
from zeroxide.zero.unit import Unit

__all__ = ["StrayReaders"]

_LAST_WAIT = 5.0
"""Seconds."""


class Passes(Protocol):
    """Who knows whether a pass goes on, in which all ranks come to the same read."""

    gatherer: Gatherer
    uses_apart: int

    @property
    def units(self) -> Sequence[Unit]:
        """All units, by number."""

    def is_passing(self) -> bool:
        """Whether a forward or backward goes on."""


class StrayReaders:
    """Brings weights to readers that nothing announced, for as long as a pass goes on, until it is closed."""

    def __init__(self, core: _core.Offload, passes: Passes) -> None:
        self._bringer = core.bringer()
        self._thread = threading.Thread(
            target=_serve, args=(self._bringer, weakref.ref(passes)), name="zeroxide-readers", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, or leaves it to the end of what it waits for."""
        self._bringer.close()
        self._thread.join(_LAST_WAIT)


def _serve(bringer: _core.Bringer, found: weakref.ref[Passes]) -> None:
    while bringer.listen():
        index = bringer.take()
        if index is None:
            continue
        problem: str | None = None
        try:
            passes = found()
            if passes is None or not (passes.is_passing() or passes.uses_apart):
                raise ModelError("its parts are on several ranks, which meet only during a forward or backward")
            passes.gatherer.bring(passes.units[index])
        except (ZeroxideError, RuntimeError) as error:
            problem = str(error)
        finally:
            passes = None
            bringer.answer(problem)

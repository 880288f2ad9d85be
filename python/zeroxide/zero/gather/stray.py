"""Readers that nothing announced, of weights that lie in parts on several ranks: a thread brings them.

A view of a weight can be read when its unit is not gathered: by autograd, which saved it for a node of another module,
or by whoever kept it. The read faults and waits (`fault.rs`). With one rank the core brings what is missing; here the
other ranks have a part in it, and all of them come to the same read, since they run the same pass.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from zeroxide import _core
from zeroxide.errors import ModelError, ZeroxideError

if TYPE_CHECKING:
    from zeroxide.zero.hooks import Hooks

__all__ = ["StrayReaders"]

_LAST_WAIT = 5.0
"""Seconds."""


class StrayReaders:
    """Brings weights to readers that nothing announced, for as long as a pass goes on, until it is closed."""

    def __init__(self, core: _core.Offload, hooks: Hooks) -> None:
        self._bringer = core.bringer()
        self._thread = threading.Thread(
            target=_serve, args=(self._bringer, weakref.ref(hooks)), name="zeroxide-readers", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, or leaves it to the end of what it waits for."""
        self._bringer.close()
        self._thread.join(_LAST_WAIT)


def _serve(bringer: _core.Bringer, found: weakref.ref[Hooks]) -> None:
    while bringer.listen():
        index = bringer.take()
        if index is None:
            continue
        problem: str | None = None
        try:
            hooks = found()
            if hooks is None or not (hooks.is_passing() or hooks.uses_apart):
                raise ModelError("its parts are on several ranks, which meet only during a forward or backward")
            hooks.gatherer.bring(hooks.units[index])
        except (ZeroxideError, RuntimeError) as error:
            problem = str(error)
        finally:
            hooks = None
            bringer.answer(problem)

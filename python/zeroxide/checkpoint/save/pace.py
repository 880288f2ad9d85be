"""How much of the processor a save in the background takes from training.

The threads of a matrix product wait for one another: what another thread takes from one of them, all of them lose. A
save that runs as fast as it can makes a step or two several times as long; one that rests makes more steps a little
longer.
"""

from __future__ import annotations

import threading
import time

__all__ = ["Pace"]

SHARE = 0.2
"""Of one core, for each thread of a save that nobody waits for."""
LEAST_SECONDS = 0.005
"""Of work between two rests."""


class Pace:
    """Has the one thread that calls `rest` work so much of the time, unless somebody is in a hurry.

    hurry: set while somebody waits for what the thread does; ends a rest at once. A program at its end waits as well.
    """

    def __init__(self, hurry: threading.Event) -> None:
        self._hurry = hurry
        self._since = time.thread_time()

    def rest(self, *, needed: bool = False) -> None:
        """Rests for as long as the work since the last call demands; not where somebody waits for it.

        needed: whether somebody will wait for what was done, and for what is to be done next.
        """
        worked = time.thread_time() - self._since
        if worked < LEAST_SECONDS:
            return
        if not needed and not self._hurry.is_set() and threading.main_thread().is_alive():
            self._hurry.wait(worked * (1 / SHARE - 1))
        # Work that was waited for is not made up for later.
        self._since = time.thread_time()

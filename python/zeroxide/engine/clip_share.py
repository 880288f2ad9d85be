"""Whether updating before it is known if the step clips takes fewer bytes on disk than waiting, from the steps so far.

A step that speculates saves bytes if it does not clip and costs many more if it does. What share of steps will clip is
estimated as (c + 1) / (n + 2) of c among n steps (Laplace's rule of succession), each step's weight falling by 1/64
with every later one: nothing is known before the first, so that updates wait, and a phase in which most clip is
forgotten.
"""

from __future__ import annotations

__all__ = ["MEMORY", "ClipShare"]

MEMORY = 64
"""Steps after which one has lost most of its weight, and the most that the steps so far count for together."""


class ClipShare:
    """The share of steps that clip, or are left out, and what follows from it."""

    def __init__(self, saved: int, lost: int) -> None:
        """saved: bytes on disk that a step which speculates takes less than one which waits, if it does not clip; lost:
        bytes that come on top if it clips."""
        self._saved, self._lost = saved, lost
        self._steps = self._clipped = 0.0

    @property
    def expected(self) -> float:
        """The share that is expected of the next steps."""
        return (self._clipped + 1) / (self._steps + 2)

    def note(self, clipped: bool) -> None:
        """A step was made that clipped or was left out, or one that did not, whether it speculated or not."""
        kept = 1 - 1 / MEMORY
        self._steps = kept * self._steps + 1
        self._clipped = kept * self._clipped + clipped

    def pays(self) -> bool:
        """Whether the next step is expected to take fewer bytes if it speculates."""
        return self.expected * self._lost < self._saved

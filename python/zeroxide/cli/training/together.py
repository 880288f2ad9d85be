"""What the ranks of a run do alike: what rank 0 finds out, when they stop, and the mean of what each computed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from zeroxide.cli.training.interrupt import StopRequest
from zeroxide.distributed import Ranks
from zeroxide.errors import RanksError, ZeroxideError

__all__ = ["Together"]


class Together:
    """One rank among those of a run; alone it is the only one, and nothing is exchanged."""

    def __init__(self, ranks: Ranks, stop: StopRequest) -> None:
        self.ranks = ranks
        self.stop = stop
        self._agreed: int | None = None

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.ranks.world

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes what all have in common and speaks to the user."""
        return self.ranks.rank == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make`, called on rank 0 alone, returns there: anything that JSON can hold.

        Where it raises a ZeroxideError, rank 0 raises that and the others RanksError with its line.
        """
        value, failed = None, None
        if self.first:
            try:
                value = make()
            except ZeroxideError as error:
                failed = error
        if self.world == 1:
            if failed is not None:
                raise failed
            return value
        value, line = self.ranks.gather_objects([value, None if failed is None else failed.message])[0]
        if failed is not None:
            raise failed
        if line is not None:
            raise RanksError(f"rank 0: {line}", ranks=(0,))
        return value

    def step(self, loss: float) -> float:
        """Ends a step on all ranks: returns the mean of their losses, and from now on all know of a signal to any."""
        if self.world == 1:
            return loss
        told = self.ranks.gather_objects([loss, self.stop.number])
        self._agreed = next((number for _, number in told if number is not None), None)
        if self._agreed is not None:
            self.stop.number = self._agreed
        return fmean(each for each, _ in told)

    @property
    def stopping(self) -> bool:
        """Whether a signal asks to stop; with several ranks one that all know of, so that all stop at one place."""
        return self.stop.requested if self.world == 1 else self._agreed is not None

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.world > 1:
            self.ranks.barrier()

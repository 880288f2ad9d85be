"""Decides from what is heard of the ranks whether the job can go on. No sockets, threads or clocks: time is told.

Rank 0 judges everybody. Any other rank judges rank 0 alone, with the same rules, in case it is rank 0 that is lost.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from zeroxide.distributed.agreement import name_ranks
from zeroxide.distributed.health.activity import Activity, Failure, describe, is_waiting, summary
from zeroxide.distributed.host import Process, oom_kills

__all__ = ["FailureDetector", "Member"]

_BUSY = 0.1
"""A silent process that used this share of a processor since it was last heard is computing with Python's lock held."""


@dataclass(slots=True)
class Member:
    """One rank as the others know it."""

    rank: int
    host: list[str]
    process: Process
    status: Literal["running", "finished", "failed", "gone"] = "running"
    activity: Activity = field(default_factory=Activity)
    silence: float = 0.0
    """Seconds since it was last heard of, not counting those in which nobody was listening."""
    line: str = ""
    """Its own words on why it failed."""
    ended_for: float = 0.0
    """Seconds since it was known to have finished or failed."""
    ticks_when_heard: int | None = None

    @property
    def where(self) -> str:
        """For people: which process on which host."""
        return f"process {self.process.pid} on {self.host[0]}"


class FailureDetector:
    """What is known of every rank, and the first reason to end.

    timeout: seconds of silence, or of waiting for different things, that are taken for a failure.
    grace: seconds that a rank's own words wait for a deeper reason: when one rank is killed the others' collectives
        fail at once, and what they then say is a consequence.
    """

    def __init__(self, members: Sequence[Member], own_rank: int, timeout: float, grace: float) -> None:
        self._sees_all = own_rank == 0
        self.members = {each.rank: each for each in members if self._sees_all or each.rank in (0, own_rank)}
        self.told = ""
        """What rank 0 last said of all the others; for the ranks that do not see them."""
        self._own = self.members[own_rank]
        self._watched = [each for each in self.members.values() if each is not self._own]
        self._timeout = timeout
        self._grace = grace
        self._oom_kills = oom_kills()

    def heard(self, rank: int, activity: Activity) -> None:
        """A sign of life."""
        member = self.members[rank]
        member.activity = activity
        member.silence = 0.0
        member.ticks_when_heard = None

    def finished(self, rank: int) -> None:
        """The rank has left of its own accord."""
        if self.members[rank].status == "running":
            self.members[rank].status = "finished"

    def failed(self, rank: int, line: str) -> None:
        """The rank has said why it fails."""
        if self.members[rank].status == "running":
            self.members[rank].status = "failed"
            self.members[rank].line = line

    def gone(self, rank: int) -> None:
        """The connection of the rank has closed; unless it has said why, it was killed."""
        if self.members[rank].status == "running":
            self.members[rank].status = "gone"

    def pass_time(self, seconds: float) -> Failure | None:
        """Counts `seconds` during which this rank was listening; the reason to end, if there is one."""
        for member in self.members.values():
            if member.status == "running":
                member.silence += seconds
            else:
                member.ended_for += seconds
        return self._lost() or self._silent() or self._said() or self._apart()

    def look(self) -> None:
        """Asks the system after the running ranks of this host: a process that is gone need not be waited for."""
        for member in self._watched:
            if member.status == "running" and member.host == self._own.host:
                state, ticks = member.process.look()
                if state == "gone":
                    member.status = "gone"
                elif member.ticks_when_heard is None:
                    member.ticks_when_heard = ticks

    def others(self, blamed: Sequence[int]) -> str:
        """What the ranks that are not blamed are doing."""
        known = summary((each.rank, self.text(each)) for each in self.members.values() if each.rank not in blamed)
        return f"{known}; shortly before: {self.told}" if self.told else known

    def text(self, member: Member) -> str:
        """What is known of one rank."""
        return describe(member.activity.doing) if member.status == "running" else member.status

    def _lost(self) -> Failure | None:
        lost = [each for each in self._watched if each.status == "gone"]
        if not lost:
            return None
        first, blamed = lost[0], [each.rank for each in lost]
        kills = oom_kills() - self._oom_kills if first.host == self._own.host else 0
        memory = f"; the kernel has killed {kills} processes of this host for want of memory meanwhile" if kills else ""
        were = "was" if len(lost) == 1 else "were"
        sign = "is gone" if first.host == self._own.host else "has closed its connection"
        return self._failure(
            blamed,
            f"{name_ranks(blamed)} {were} killed or ended without a word: {first.where} {sign}, it was "
            f"{describe(first.activity.doing)}{memory}",
            "look at its last output",
        )

    def _silent(self) -> Failure | None:
        for member in self._watched:
            if member.status != "running" or member.silence <= self._timeout:
                continue
            state, ticks = member.process.look() if member.host == self._own.host else ("unknown", 0)
            before = member.ticks_when_heard
            used = 0.0 if before is None else (ticks - before) / os.sysconf("SC_CLK_TCK")
            if state == "running" and used >= _BUSY * member.silence:
                # It computes and lets no other Python thread run.
                member.silence = 0.0
                member.ticks_when_heard = ticks
                continue
            what = "is stopped (a signal or a debugger halts it)" if state == "stopped" else "does not answer"
            return self._failure(
                [member.rank],
                f"rank {member.rank} {what}: nothing was heard of {member.where} for {member.silence:.1f} s, it was "
                f"{describe(member.activity.doing)}",
                "look at that process and its host",
            )
        return None

    def _said(self) -> Failure | None:
        said = [each for each in self.members.values() if each.status == "failed"]
        if not said or max(each.ended_for for each in said) < self._grace:
            return None
        first = max(said, key=lambda each: each.ended_for)
        doing = describe(first.activity.doing)
        return self._failure([first.rank], f"rank {first.rank} failed while {doing}: {first.line}", "")

    def _apart(self) -> Failure | None:
        """All that still run wait, none for the same, or for somebody who has finished."""
        running = [each for each in self.members.values() if each.status == "running"]
        if not running or not all(
            is_waiting(each.activity.doing) and each.activity.seconds > self._timeout for each in running
        ):
            return None
        finished = [each.rank for each in self.members.values() if each.status == "finished"]
        waits = {each.activity.doing[1:] for each in running}
        longest = min(each.activity.seconds for each in running)
        if finished:
            # A rank may finish at once after it came late; the others have then not yet noticed that they may go on.
            if min(self.members[rank].ended_for for rank in finished) <= self._timeout:
                return None
            return self._failure(
                finished,
                f"{name_ranks(finished)} finished, and the others have waited for {longest:.1f} s",
                "give every rank the same number of batches and steps",
            )
        if len(waits) == 1 or not self._sees_all:
            return None
        return self._failure(
            [],
            f"ranks have waited for different things for {longest:.1f} s",
            "every rank must run the same modules in the same order: look for control flow that depends on the data",
        )

    def _failure(self, blamed: Sequence[int], line: str, remedy: str) -> Failure:
        others = self.others(blamed)
        return Failure(
            f"{line}{f'; {others}' if others else ''}{f'; {remedy}' if remedy else ''}",
            tuple(blamed) or tuple(self.members),
        )

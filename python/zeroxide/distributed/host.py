"""Which host a process is on, and whether a process of this host still lives.

Everything is read from `/proc`. Where that is not possible nothing is known, and callers fall back on time.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Process", "State", "host_identity", "oom_kills"]

State = Literal["running", "stopped", "gone", "unknown"]

_NAMESPACES = ("pid", "user", "net")


def host_identity() -> list[str]:
    """Equal for two processes exactly when they share hostname, boot, and pid, user and network namespaces.

    Then a pid of one means the same process to the other, and 127.0.0.1 the same interface. A container on the same
    machine differs. Namespaces that cannot be read count as this process's own, equal to nobody's.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES]
    except OSError:
        boot, spaces = "unknown", [f"process {os.getpid()}"]
    return [socket.gethostname(), boot, *spaces]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of this host. `started` (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    started: int | None

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        pid = os.getpid()
        fields = _stat(pid)
        return cls(pid, None if fields is None else int(fields[19]))

    def look(self) -> tuple[State, int]:
        """What the process does, and the CPU time it has used in clock ticks (0 where unknown).

        A zombie counts as gone: it has ended, only its parent has not yet asked how.
        """
        if self.started is None:
            return "unknown", 0
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.started or fields[0] in "ZXx":
            return "gone", 0
        return "stopped" if fields[0] in "Tt" else "running", int(fields[11]) + int(fields[12])


def _stat(pid: int) -> list[str] | None:
    """The fields of `/proc/PID/stat` from the third (the state) on; see proc_pid_stat(5)."""
    try:
        # The second field is the program's name in parentheses and may hold anything, parentheses and spaces included.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None


def oom_kills() -> int:
    """How many processes the kernel of this host has killed for want of memory since it booted; 0 where unknown."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0

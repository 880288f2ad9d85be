"""Processes without the seconds that importing torch takes: forked from one that has done it (`fork_server.py`)."""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
IMPORTS = ("torch", "torch.distributed", "torch._dynamo", "pydantic", "safetensors.torch")
"""What an engine imports that is not ours."""


LEAKS = re.compile(r"nanobind: leaked .*?refleaks\.html\n?", re.DOTALL)
"""What triton says of objects that are there at the end."""


def without_leaks(err: str) -> str:
    """What the program itself has said on standard error."""
    return LEAKS.sub("", err)


class ForkServer:
    """This side of one server, which imports `IMPORTS` and `more`, with `env` added to its environment, and ends with
    this process at the latest.

    A process that gives back at its end what it was forked with spends most of a second on that. Unless `quiet` it
    gives back only what it has made itself, and libraries say on standard error what they miss: see `without_leaks`.
    """

    def __init__(self, more: Sequence[str] = (), *, quiet: bool = False, env: Mapping[str, str] | None = None) -> None:
        self._channel, theirs = socket.socketpair()
        # What torch reads once, when it is imported.
        given = {**os.environ, "OMP_NUM_THREADS": "1"}
        given.pop("PYTHONPATH", None)
        with theirs:
            command = [
                sys.executable,
                str(SERVER),
                str(theirs.fileno()),
                "quiet" if quiet else "quick",
                *IMPORTS,
                *more,
            ]
            self._process = subprocess.Popen(
                command,
                env=given | dict(env or {}),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._received = b""
        self._started: list[int] = []
        self._codes: dict[int, int] = {}
        atexit.register(self.close)

    def fork(self, script: Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path) -> ForkedProcess:
        """What `python SCRIPT ARGS` with this environment would be, with its output in new files."""
        for each in (out, err):
            each.touch()
        request = {"script": str(script), "args": list(args), "env": dict(env), "out": str(out), "err": str(err)}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while not self._started:
            self.hear(None)
        return ForkedProcess(self, self._started.pop())

    def code(self, pid: int) -> int | None:
        """How the process ended, as `Popen.returncode`; None before that has been heard."""
        return self._codes.get(pid)

    def hear(self, seconds: float | None) -> None:
        """Takes what the server has said, waiting at most so long for a first word; None is without limit."""
        if not select.select([self._channel], [], [], seconds)[0]:
            return
        more = self._channel.recv(1 << 16)
        if not more:
            raise RuntimeError(f"the server that forks processes has ended with {self._process.wait()}")
        *lines, self._received = (self._received + more).split(b"\n")
        for line in lines:
            pid, code = json.loads(line)
            if code is None:
                # The number may be one that an ended process had.
                self._codes.pop(pid, None)
                self._started.append(pid)
            else:
                self._codes[pid] = code

    def close(self) -> None:
        """Ends the server."""
        self._channel.close()
        self._process.wait()


class ForkedProcess:
    """One of them, as `subprocess.Popen` shows a process."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit status, or None while the process is there."""
        if self.returncode is None:
            self._server.hear(0.0)
            self.returncode = self._server.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end. Raises `subprocess.TimeoutExpired`."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._server.hear(left)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

"""A process that has imported what others import first, and forks a process for each line of JSON on its socket.

`python fork_server.py DESCRIPTOR quiet|quick MODULE...` is how `forking.py` starts it. A line names the script, its
arguments, the environment, and the files for standard output and error. An answer of [pid, null] says that the process
is there, [pid, code] how it ended. The server ends with the other end of its socket.

It imports nothing of zeroxide, and nothing of this folder: what it forks imports that itself, as it is on disk then.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

BASE_PATH = list(sys.path[1:])
"""What is importable without `PYTHONPATH`, which the server is started without."""


def import_ahead(ending: str, modules: list[str]) -> None:
    """Imports what takes most of a start. Fails where that has started threads."""
    for name in modules:
        importlib.import_module(name)
    # A lock that another thread holds at the fork would never be given back.
    tasks = os.listdir("/proc/self/task")
    assert len(tasks) == 1, f"the imports have started {len(tasks) - 1} threads"
    # A collection in the child then leaves the pages shared on which the objects made so far lie.
    gc.collect()
    gc.freeze()
    if ending == "quiet":
        # The last collection takes them as well, or libraries find objects of theirs left, and say so.
        atexit.register(gc.unfreeze)


def serve(channel: socket.socket) -> dict[str, Any]:
    """Forks and tells of ends until the channel closes, which ends the process. Returns in forked processes only."""
    ends: dict[int, int] = {}
    received = b""
    while True:
        ready, _, _ = select.select([channel, *ends], [], [])
        for end in ends.keys() & set(ready):
            pid = ends.pop(end)
            os.close(end)
            answer(channel, pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if channel not in ready:
            continue
        more = channel.recv(1 << 16)
        if not more:
            os._exit(0)
        *lines, received = (received + more).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                for each in (channel.detach(), *ends):
                    os.close(each)
                return json.loads(line)
            ends[os.pidfd_open(pid)] = pid
            answer(channel, pid, None)


def answer(channel: socket.socket, pid: int, code: int | None) -> None:
    """Nothing is left to answer where the other end has closed already: `serve` sees that next."""
    try:
        channel.sendall(json.dumps([pid, code]).encode() + b"\n")
    except BrokenPipeError:
        return


def become(request: dict[str, Any]) -> types.CodeType:
    """Makes this process what `python SCRIPT ARGS` would be; the code to run, in a new `__main__`."""
    for descriptor, name in ((1, "out"), (2, "err")):
        opened = os.open(request[name], os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    script = Path(request["script"])
    sys.argv = [str(script), *request["args"]]
    sys.path[:] = [str(script.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *BASE_PATH]
    importlib.import_module("untrimmed").leave_libraries()
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    return compile(script.read_bytes(), str(script), "exec")


if __name__ == "__main__":
    import_ahead(sys.argv[2], sys.argv[3:])
    # An interrupt from the keyboard reaches the whole group: it is for the tests, whose end is this process's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = become(serve(socket.socket(fileno=int(sys.argv[1]))))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(program, sys.modules["__main__"].__dict__)

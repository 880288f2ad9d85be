"""What every benchmark here shares: interpreters, machine, contestants that take turns, and one JSON line a result.

Times on a shared machine drift from minute to minute. So the two sides are never measured one after the other: each
round runs every contestant once, and results are medians over rounds and ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).resolve().parent
REPOSITORY = BENCHES.parent
WORKERS = BENCHES / "workers"
PEERS = BENCHES / ".peers"

# Huge pages for whatever malloc and torch's CPU allocator give out, where the kernel gives them on request only. A
# program without them pays for 512 times the pages: in page faults, and in disk transfers that are split, since a
# request holds a limited number of segments.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
# glibc's defaults; glibc told to keep freed memory mapped, which saves the page faults of every step; and the same with
# huge pages.
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "keep": KEEP, "keep-huge": KEEP | HUGE_PAGES}


class WorkerFailed(Exception):
    """A worker ended without a result; the message holds its command and the end of what it printed."""


@dataclass(frozen=True)
class Side:
    """An interpreter and the environment variables that its workers need."""

    python: Path
    environment: dict[str, str] = field(default_factory=dict)

    def variables(self, extra: dict[str, str], threads: int) -> dict[str, str]:
        """The whole environment of one worker: this process's own, without its allocator settings."""
        settings = ("MALLOC_", "THP_", "GLIBC_TUNABLES")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
        return inherited | {"OMP_NUM_THREADS": str(threads)} | self.environment | extra


def zeroxide_side() -> Side:
    """The interpreter that runs this script, in which zeroxide must be installed."""
    return Side(Path(sys.executable))


def zeroxide_among_peers() -> Side:
    """The peers' interpreter with zeroxide beside its packages: whatever a library imports, both sides have it."""
    import zeroxide

    package = Path(zeroxide.__file__).parent
    beside = PEERS / "beside"
    beside.mkdir(parents=True, exist_ok=True)
    link = beside / package.name
    link.unlink(missing_ok=True)
    link.symlink_to(package)
    return Side(peers_side().python, {"PYTHONPATH": str(beside)})


def peers_side() -> Side:
    """The peers' own interpreter and compiled operators; leaves with one line when they are not there."""
    python = PEERS / "venv" / "bin" / "python"
    if not python.exists():
        sys.exit(f"benches: error: the peers are not installed: run {sys.executable} {BENCHES / 'peers' / 'setup.py'}")
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return Side(
        python,
        {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(PEERS / "extensions"), "PATH": path},
    )


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times each contestant runs (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="compute threads")
    parser.add_argument(
        "--prefix", type=shlex.split, default=[], help="command put before every worker, as in 'taskset -c 0,1'"
    )
    return parser


def scratch_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --directory: where files are written, on the disk to be measured."""
    parser.add_argument(
        "--directory", type=Path, default=REPOSITORY / "runs" / "bench", help="scratch files (default %(default)s)"
    )


def run_worker(
    side: Side,
    worker: str,
    spec: dict[str, Any],
    *,
    threads: int,
    environment: dict[str, str] | None = None,
    prefix: Iterable[str] = (),
    timeout: float = 900,
) -> dict[str, Any]:
    """Runs `workers/<worker>` with `spec` in a process of its own and returns the result it emits."""
    command = [*prefix, str(side.python), str(WORKERS / worker), json.dumps(spec)]
    try:
        done = subprocess.run(
            command,
            env=side.variables(environment or {}, threads),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(f"{worker} ran longer than {timeout:.0f} s with {json.dumps(spec)}") from error
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    end = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
    raise WorkerFailed(f"{worker} ended with status {done.returncode} and no result, {json.dumps(spec)}:\n{end}")


def run_ranks(
    side: Side,
    worker: str,
    spec: dict[str, Any],
    *,
    world: int,
    threads: int,
    environment: dict[str, str] | None = None,
    prefix: Iterable[str] = (),
    timeout: float = 900,
) -> list[dict[str, Any]]:
    """Runs `workers/<worker>` once for each of `world` ranks at a time; the results they emit, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [*prefix, str(side.python), str(WORKERS / worker), json.dumps(spec)]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world}
        variables = {key: str(value) for key, value in place.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                command,
                env=side.variables((environment or {}) | variables, threads),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    found = []
    try:
        for process in processes:
            output = process.communicate(timeout=timeout)[0].splitlines()
            results = [json.loads(line.removeprefix("RESULT ")) for line in output if line.startswith("RESULT ")]
            if not results:
                end = "\n".join(output[-12:])
                raise WorkerFailed(f"{worker} ended with status {process.returncode}, {json.dumps(spec)}:\n{end}")
            found.append(results[-1])
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(f"{worker} ran longer than {timeout:.0f} s with {json.dumps(spec)}") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return found


class Contestant:
    """A worker that stays alive between rounds, waiting on its input while others run. See workers/rounds.py."""

    def __init__(
        self,
        side: Side,
        worker: str,
        spec: dict[str, Any],
        *,
        threads: int,
        environment: dict[str, str] | None = None,
        prefix: Iterable[str] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [*prefix, str(side.python), str(WORKERS / worker), json.dumps(spec)],
            env=side.variables(environment or {}, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._name = f"{worker} {json.dumps(spec)}"
        self.about = self._answer()

    def round(self) -> dict[str, Any]:
        """Has the worker do one round and returns what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        raise WorkerFailed(f"{self._name} ended with status {self._process.wait()}")

    def close(self) -> None:
        """Ends the worker and waits for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def cargo_example(package: str, name: str, tree: Path = REPOSITORY) -> Path:
    """Builds the example `name` of `package` of the checkout `tree` in release mode and returns its path."""
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--message-format=json"]
    built = subprocess.run(
        [*command, "--package", package, "--example", name],
        cwd=tree,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == name:
            return Path(message["executable"])
    raise WorkerFailed(f"cargo built no example {name} of {package}")


def summary(values: Iterable[float], digits: int = 5) -> dict[str, Any]:
    """Median and quartiles of `values`."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": round(statistics.median(ordered), digits),
        "q1": round(quartiles[0], digits),
        "q3": round(quartiles[2], digits),
        "n": len(ordered),
    }


def goal(name: str, got: float, bound: float, *, at_most: bool) -> dict[str, Any]:
    """One figure beside the bound it is to keep."""
    kept = got <= bound if at_most else got >= bound
    return {"goal": name, "bound": ("<= " if at_most else ">= ") + str(bound), "got": round(got, 4), "met": kept}


def emit(bench: str, result: dict[str, Any]) -> None:
    """Prints one result as a line of JSON."""
    print(json.dumps({"bench": bench, **result}), flush=True)


def note(text: str) -> None:
    """Prints progress where it does not mix with results."""
    print(f"benches: {text}", file=sys.stderr, flush=True)


def machine(directory: Path | None = None) -> dict[str, Any]:
    """The machine and the versions that figures belong to."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    total = Path("/proc/meminfo").read_text().split()[1]
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    about: dict[str, Any] = {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total) / (1 << 20), 1),
        "kernel": os.uname().release,
        "huge_pages": huge.read_text().split("[")[1].split("]")[0] if huge.exists() else "none",
        "load": os.getloadavg()[0],
    }
    setup = PEERS / "setup.json"
    if setup.exists():
        about["peers"] = json.loads(setup.read_text())
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        stat = subprocess.run(
            ["stat", "--file-system", "--format=%T", directory], capture_output=True, text=True, check=False
        )
        about["file_system"] = stat.stdout.strip()
    return about

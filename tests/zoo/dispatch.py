"""Workers that go through many model types, each in a process of its own that may end or never answer."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
START_SECONDS = 120
BUILD_SECONDS = 240
MODE_SECONDS = 90
TYPES_A_WORKER = 60
"""After so many types a worker is replaced: modules of models stay imported, and memory with them."""


@dataclass
class Result:
    """What became of one model type. `modes` holds (outcome, detail) by mode."""

    model_type: str
    built: bool = False
    detail: str = ""
    modes: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        """The modes that did not do what plain torch does."""
        return [
            f"{mode}: {outcome}: {detail}"
            for mode, (outcome, detail) in self.modes.items()
            if outcome not in ("same", "skipped")
        ]

    @property
    def ran(self) -> bool:
        """Whether any mode was compared, whatever came out."""
        return any(outcome != "skipped" for outcome, _ in self.modes.values())

    def line(self) -> str:
        """One line of the summary table."""
        if not self.built:
            return f"{self.model_type}: skipped: {' '.join(self.detail.split())[:250]}"
        modes = [
            f"{mode} {outcome}" + ("" if outcome == "same" else f" ({detail})")
            for mode, (outcome, detail) in self.modes.items()
        ]
        return f"{self.model_type}: {self.detail}: " + "; ".join(modes)


class _Gone(Exception):
    """The worker's process has ended or did not answer in time."""


class _Worker:
    def __init__(self, directory: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.errors = (directory / f"worker-{os.getpid()}-{threading.get_ident()}.err").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(WORKER), str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment,
        )  # fmt: skip
        self.buffer = b""
        self.types = 0
        self.read(START_SECONDS)

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise _Gone("the process had ended") from error

    def read(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise _Gone(f"no answer in {limit:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                code = self.process.wait()
                raise _Gone(f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}")
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                stream.close()


class Zoo:
    """Runs all types given, in order, on a few workers."""

    def __init__(self, types: list[str], modes: list[str], directory: Path, workers: int) -> None:
        self.modes = modes
        self.directory = directory
        self.futures: dict[str, Future[Result]] = {each: Future() for each in types}
        self.waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for each in types:
            self.waiting.put(each)
        self.stopping = False
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def result(self, model_type: str) -> Result:
        """Waits for what became of a type."""
        return self.futures[model_type].result()

    def close(self) -> None:
        """Ends the workers after the type that each is at."""
        self.stopping = True
        for thread in self.threads:
            thread.join()

    def _serve(self) -> None:
        worker: _Worker | None = None
        while not self.stopping:
            try:
                model_type = self.waiting.get_nowait()
            except queue.Empty:
                break
            result = Result(model_type)
            begun = time.monotonic()
            left = list(self.modes)
            while True:
                try:
                    if worker is None or worker.types >= TYPES_A_WORKER:
                        if worker is not None:
                            worker.close()
                        worker = _Worker(self.directory)
                    worker.types += 1
                    self._run(worker, result, left)
                    break
                except _Gone as error:
                    if worker is not None:
                        worker.close()
                        worker = None
                    if not result.built:
                        result.detail = str(error)
                        break
                    if left:
                        result.modes[left.pop(0)] = ("died", str(error))
                    if not left:
                        break
            result.seconds = time.monotonic() - begun
            self.futures[model_type].set_result(result)
        if worker is not None:
            worker.close()

    def _run(self, worker: _Worker, result: Result, left: list[str]) -> None:
        """Asks for the modes that are left, and takes each off the list when its answer is there."""
        worker.ask("\t".join([result.model_type, *left]))
        answer = worker.read(BUILD_SECONDS)
        result.built = answer["built"]
        result.detail = answer["detail"]
        while result.built and left:
            answer = worker.read(MODE_SECONDS)
            result.modes[answer["mode"]] = (answer["outcome"], answer["detail"])
            left.remove(answer["mode"])


def main() -> None:
    """`python dispatch.py OUT TYPES MODES [WORKERS]`: lines to OUT; TYPES (`all`, `ways`) and MODES have commas."""
    import tempfile

    sys.path[:0] = [str(WORKER.parent), str(WORKER.parent.parent / "numerics")]
    from small_models import model_types

    out, names, modes = sys.argv[1:4]
    if names == "ways":
        from weight_uses import WAYS

        types = [f"way:{each}" for each in WAYS]
    else:
        types = model_types() if names == "all" else names.split(",")
    chosen = ["tiny", "checkpointing", "bf16"] if modes == "all" else modes.split(",")
    with tempfile.TemporaryDirectory(prefix="zoo-") as directory, open(out, "w") as lines:
        zoo = Zoo(types, chosen, Path(directory), int(sys.argv[4]) if len(sys.argv) > 4 else os.cpu_count() or 1)
        for each in types:
            result = zoo.result(each)
            print(f"[{result.seconds:.1f} s] {result.line()}", file=lines, flush=True)
        zoo.close()


if __name__ == "__main__":
    main()

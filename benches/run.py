"""Run every benchmark at modest sizes; results are lines of JSON on standard output.

    python benches/run.py                       about half an hour on two cores
    python benches/run.py cpu_adam disk_queue   only these
    python benches/run.py --out runs/bench.jsonl

Each benchmark is a script of its own with more options: see its --help. The peers' environment must have been made
with benches/peers/setup.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

SIZES = {
    "import_time": ["--rounds", "7"],
    "cpu_adam": ["--rounds", "5", "--parameters", "64000000"],
    "disk_queue": ["--rounds", "5"],
    "hook_time": [],
    "checkpoint": ["--rounds", "1", "--model", "124m"],
    "data_parallel": ["--rounds", "2"],
    "quantised_loss": [],
    "train_step": ["--rounds", "2", "--model", "124m"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every benchmark at modest sizes.")
    parser.add_argument("benchmark", nargs="*", help=f"which to run (default all): {', '.join(SIZES)}")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    options = parser.parse_args()
    for name in options.benchmark:
        if name not in SIZES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(SIZES)}")
    out = None
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        out = options.out.open("w")
    failed = []
    for name in options.benchmark or SIZES:
        command = [sys.executable, str(HERE / f"{name}.py"), *SIZES[name]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if out is not None:
                out.write(line)
                out.flush()
        if process.wait() != 0:
            failed.append(name)
    if failed:
        sys.exit(f"benches: error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

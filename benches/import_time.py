"""What importing costs beyond torch, and that a first step needs no compiler.

    python benches/import_time.py --rounds 15

Each sample is a fresh interpreter that has imported torch before the clock starts. `zeroxide` loads its parts when
they are first used, so what counts is the line with `zeroxide.initialize`, which loads all that a training run uses.
The second half trains two steps with nothing on PATH, no CC or CXX, and an audit hook that refuses to start programs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from typing import Any

import side_by_side as bench

PROBE = """
import json, sys, time
import torch
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
rss_before, modules_before, start = rss(), len(sys.modules), time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "rss": rss() - rss_before, "modules": len(sys.modules) - modules_before}}))
"""

STATEMENTS = {
    "zeroxide": "import zeroxide",
    "zeroxide with zeroxide.initialize": "import zeroxide; zeroxide.initialize",
    "deepspeed": "import deepspeed",
}


def sample(name: str, options: Any) -> dict[str, Any]:
    """One fresh interpreter."""
    side = bench.peers_side() if name == "deepspeed" else bench.zeroxide_side()
    done = subprocess.run(
        [*options.prefix, str(side.python), "-c", PROBE.format(statement=STATEMENTS[name])],
        env=side.variables({}, options.threads),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_step(options: Any) -> dict[str, Any]:
    """Two training steps of a tiny model, with its state on disk, where no program can be started."""
    directory = options.directory / "import-time"
    empty = directory / "empty-path"
    shutil.rmtree(directory, ignore_errors=True)
    empty.mkdir(parents=True)
    spec = {
        "model": "tiny",
        "rows": 1,
        "columns": 32,
        "steps": 2,
        "offload": "nvme",
        "directory": str(directory),
        "threads": options.threads,
        "no_processes": True,
    }
    start = time.perf_counter()
    try:
        result = bench.run_worker(
            bench.zeroxide_side(),
            "zeroxide_step.py",
            spec,
            threads=options.threads,
            environment={"PATH": str(empty), "CC": "/nonexistent", "CXX": "/nonexistent"},
        )
    except bench.WorkerFailed as error:
        return {"check": "first step without a compiler", "met": False, "error": str(error)}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "check": "first step without a compiler",
        "met": len(result["steps"]) == spec["steps"],
        "process_seconds": round(time.perf_counter() - start, 2),
        "until_first_step_seconds": round(result["import_seconds"] + result["setup_seconds"], 2),
    }


def main() -> None:
    parser = bench.arguments(__doc__ or "")
    bench.scratch_argument(parser)
    parser.set_defaults(rounds=11)
    options = parser.parse_args()

    bench.emit("machine", bench.machine())
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in STATEMENTS}
    # The first round fills the page cache and the byte-code caches.
    for number in range(options.rounds + 1):
        for name, found in samples.items():
            one = sample(name, options)
            if number > 0:
                found.append(one)
    for name, found in samples.items():
        bench.emit(
            "import_time",
            {
                "contestant": name,
                "beyond": "torch",
                "seconds": bench.summary((one["seconds"] for one in found), 4),
                "rss_mb": bench.summary((one["rss"] / 1e6 for one in found), 1),
                "modules": found[0]["modules"],
            },
        )
        if name.startswith("zeroxide"):
            median = bench.summary(one["seconds"] for one in found)["median"]
            bench.emit("import_time", bench.goal(f"seconds to import {name}, beyond torch", median, 0.2, at_most=True))
    setup = bench.PEERS / "setup.json"
    if setup.exists():
        operators = json.loads(setup.read_text())["operators"]
        bench.emit("import_time", {"contestant": "deepspeed", "compile_seconds": operators})
    bench.emit("import_time", first_step(options))


if __name__ == "__main__":
    main()

"""Make the peers' environment: a virtual environment in benches/.peers and DeepSpeed's compiled operators.

    python benches/peers/setup.py

Needs Python 3.11 or later with venv, a C++ compiler, the headers of Python, of libaio (Debian: g++ python3-dev
libaio-dev), about 7 GB of disk and, on two cores, ten minutes. What was done and how long each operator took to
compile is kept in benches/.peers/setup.json; run again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# cpu_adam: the CPU optimizer. async_io: NVMe offload. shm_comm: collectives on one host, loaded by every CPU run.
# fused_adam: the optimizer without offload.
OPERATORS = ("cpu_adam", "async_io", "shm_comm", "fused_adam")


def require(directory: Path) -> None:
    """Leaves with one line that names everything missing."""
    missing = []
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing.append("a C++ compiler (g++, or set CXX)")
    if not any(Path(root, "libaio.h").exists() for root in ("/usr/include", "/usr/local/include")):
        missing.append("the headers of libaio (Debian: libaio-dev)")
    free = shutil.disk_usage(directory).free
    if free < 7e9 and not (directory / "venv").exists():
        missing.append(f"7 GB of disk under {directory} (there are {free / 1e9:.1f})")
    if missing:
        sys.exit(f"peers: error: missing: {', '.join(missing)}")


def install(directory: Path) -> Path:
    """The virtual environment with everything in requirements.txt; returns its interpreter."""
    python = directory / "venv" / "bin" / "python"
    if not python.exists():
        print(f"peers: making {directory / 'venv'}", flush=True)
        venv.create(directory / "venv", with_pip=True, symlinks=True)
    print("peers: installing requirements.txt", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    # DeepSpeed's build imports torch, so it comes last and is built without isolation.
    first = [line for line in lines if line and not line.startswith(("#", "deepspeed"))]
    last = [line for line in lines if line.startswith("deepspeed")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([*pip, *first], check=True, env=environment)
    subprocess.run([*pip, "--no-build-isolation", *last], check=True, env=environment)
    return python


def compile_operator(python: Path, name: str, directory: Path) -> float:
    """Compiles one operator from nothing; returns seconds."""
    extensions = directory / "extensions"
    for found in extensions.glob(f"*{name}*") if extensions.exists() else ():
        shutil.rmtree(found)
    print(f"peers: compiling {name}", flush=True)
    done = subprocess.run(
        [str(python), str(HERE / "compile_ops.py"), name],
        env=os.environ
        | {
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(extensions),
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        sys.exit(f"peers: error: {name} did not compile:\n{end}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def versions(python: Path) -> dict[str, str]:
    """What is installed in the environment, by name."""
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({n: m.version(n) for n in ('torch', 'deepspeed', 'transformers', 'numpy')}"
        " | {'python': sys.version.split()[0]}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the peers' environment and compile DeepSpeed's operators.")
    parser.add_argument("--directory", type=Path, default=HERE.parent / ".peers", help="where (default %(default)s)")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    require(directory)
    python = install(directory)
    record = directory / "setup.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    operators: dict[str, float] = known.get("operators", {})
    for name in OPERATORS:
        if name not in operators:
            operators[name] = compile_operator(python, name, directory)
        # Written each time, so that a run cut short goes on where it stopped.
        record.write_text(json.dumps({"versions": versions(python), "operators": operators}, indent=2) + "\n")
    print(record.read_text(), end="")


if __name__ == "__main__":
    main()

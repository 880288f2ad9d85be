"""Tests and measurements on a GPU: `make gpu`, or `PYTHONPATH=python:. python3 -m benches.gpu`.

It needs torch, numpy, pytest and the extension module, and no network; what is missing beside those is said and passed
over. It prints one block of Markdown, and ends with 1 where a test or a section failed. Times are medians of events.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

Section = Callable[[], list[str]]


def refuse(line: str) -> None:
    sys.exit(f"zeroxide: error: {line}")


def sections(options: argparse.Namespace) -> list[tuple[str, Section]]:
    """Headings and what writes the lines under them, the most important first: time may run out."""
    from benches.gpu import checks, copies, engine, kernels

    return [
        ("Tests", lambda: checks.tests(options.test_seconds)),
        ("Device suite (Rust)", checks.device_suite),
        ("Whole steps", engine.steps),
        ("Compile", kernels.compile_times),
        ("Kernels", lambda: kernels.rates(options.elements)),
        ("Host memory", copies.host_memory),
        ("Copies by size", copies.by_size),
        ("Both directions, and beside a kernel", copies.overlap),
        ("Launch", kernels.launch_time),
        ("Emptied storage", checks.emptied_storage),
        ("Optimizer step beside torch", lambda: kernels.beside_torch(options.elements)),
        ("Compute sanitizer", checks.sanitizer),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests and measurements on a GPU.")
    parser.add_argument("--seconds", type=float, default=320.0, help="begin no section after that many (default 320)")
    parser.add_argument("--test-seconds", type=float, default=240.0, help="end the tests after that many")
    parser.add_argument("--elements", type=int, default=1 << 26, help="elements of a kernel's inputs (default 2^26)")
    parser.add_argument("--out", type=Path, help="also write the block to this file, section by section")
    parser.add_argument("--only", nargs="*", help="only sections whose heading begins like one of these")
    options = parser.parse_args()
    try:
        from zeroxide import _core
    except ImportError as error:
        refuse(f"the extension module cannot be loaded ({error}): build the wheel, or put _core.abi3.so there")
    problem = _core.probe_cuda().problem
    if problem is not None:
        refuse(f"make gpu needs a GPU: {problem}")
    import torch

    if not torch.cuda.is_available():
        refuse(
            "make gpu needs a GPU: the driver shows one, and this torch does not see it; install a CUDA build of torch"
        )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ZEROXIDE_CACHE_DIR"] = cache
        failed = run(options)
    if failed:
        refuse(f"make gpu: failed: {', '.join(failed)}")


def run(options: argparse.Namespace) -> list[str]:
    """Runs the sections; headings of those that failed."""
    from benches.gpu import checks

    begun, failed, block = time.monotonic(), [], []

    def say(lines: list[str]) -> None:
        block.extend(lines)
        print("\n".join(lines), flush=True)
        if options.out is not None:
            options.out.write_text("\n".join(block) + "\n")

    say(["## GPU", "", *checks.machine()])
    for heading, section in sections(options):
        if options.only and not any(heading.startswith(each) for each in options.only):
            continue
        say(["", f"### {heading}", ""])
        if time.monotonic() - begun > options.seconds:
            say(["Not run: time was up."])
            continue
        start = time.monotonic()
        try:
            say(section())
        except Exception:
            failed.append(heading)
            say(["FAILED", "", "```", *traceback.format_exc(limit=-6).splitlines(), "```"])
        say(["", f"({time.monotonic() - start:.1f} s)"])
    return failed


main()

"""`zeroxide doctor`: what this machine has for training, and what is missing."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from typing import Annotated

import typer

from zeroxide.cli.machine.finding import Finding, State, broken

__all__ = ["doctor", "look"]

_WORDS: dict[State, str] = {"ok": "OK", "lost": "LOST", "broken": "BROKEN"}


def doctor(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Directories for offloaded state. Default: the one for temporary files.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Look at processor, memory, disks, GPUs and software: every line is OK, or says what is lost and how to get it.

    \b
    Exits with 1 where something cannot work: a directory that was named, or what zeroxide cannot do without.
    """
    findings = []
    for each in look(paths or []):
        findings.append(each)
        if not as_json:
            print(
                f"{_WORDS[each.state]:<6} {each.what}: {each.found}" + (f" -> {each.how}" if each.how else ""),
                flush=True,
            )
    works = all(each.state != "broken" for each in findings)
    if as_json:
        found = [dataclasses.asdict(each) for each in findings]
        print(json.dumps({"ok": works, "findings": found}, indent=1, ensure_ascii=False, default=str))
    return 0 if works else 1


def look(paths: list[str]) -> Iterator[Finding]:
    """Everything, as it is found; the default directory is looked at only as far as it is good."""
    from zeroxide.cli.machine import software

    yield from software.look()
    try:
        from zeroxide import _core  # noqa: F401
        from zeroxide.cli.machine import disks, gpus, processor
    except ImportError as error:
        yield broken("the core", str(error), "install a wheel of zeroxide that is built for this machine")
        return
    yield from processor.look()
    yield from gpus.look()
    for path in paths:
        yield from disks.look(path)
    if not paths:
        for each in disks.look(tempfile.gettempdir()):
            yield dataclasses.replace(each, state="lost") if each.state == "broken" else each

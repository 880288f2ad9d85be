"""`zeroxide config`: what a config comes to, whether it is right, and what may stand in one."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Annotated, Any

import typer

from zeroxide.distributed.launch import read_environment
from zeroxide.errors import ConfigError

__all__ = ["config"]

config = typer.Typer(no_args_is_help=True, help="Look at a config before a job runs with it.")

File = Annotated[str, typer.Argument(metavar="FILE", help="Config as JSON, with or without comments.")]
WorldSize = Annotated[
    int | None,
    typer.Option("--world-size", min=1, help="Ranks. Default: the launcher's variables, else 1.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@config.command()
def explain(file: File, world_size: WorldSize = None, as_json: Json = False) -> None:
    """Print the effective value of every key, and where it comes from."""
    from zeroxide.config.explain import explain as run
    from zeroxide.config.explain import left_auto
    from zeroxide.config.source import read

    world, whose = _ranks(world_size)
    found = run(read(file), world_size=world)
    if as_json:
        _print_json(
            {
                "file": file,
                "world_size": world,
                "world_size_from": whose,
                "values": [dataclasses.asdict(each) for each in found.values],
                "no_effect": [dataclasses.asdict(each) for each in found.no_effect],
                "auto": left_auto(found.source),
            }
        )
        return
    print(f"{file} on {_counted(world, 'rank')} ({whose})")
    groups: dict[str, list[Any]] = {}
    for each in found.values:
        section, dot, _ = each.key.partition(".")
        groups.setdefault(section if dot else "", []).append(each)
    if found.no_effect:
        groups["without effect"] = found.no_effect
    for name, values in groups.items():
        print(f"\n{name or 'at the top'}")
        rows = [(each.key if name in ("", "without effect") else each.key[len(name) + 1 :], each) for each in values]
        width = max(len(key) for key, _ in rows)
        shown = [_shown(each.value) for _, each in rows]
        beside = min(28, max(map(len, shown)))
        for (key, each), value in zip(rows, shown, strict=True):
            print(f"  {key:<{width}}  {value:<{beside}}  {each.why}")


@config.command()
def check(
    file: File,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face model directory, or its config.json: whether the plan fits.", show_default=False
        ),
    ] = None,
    world_size: WorldSize = None,
    ranks_per_host: Annotated[
        int | None,
        typer.Option(
            "--ranks-per-host", min=1, help="With --model. Default: all ranks on one host.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Find what is wrong with a config, all of it at once; exits with 1 where something is."""
    from zeroxide.cli.configs.check import check as run

    if ranks_per_host is not None and model is None:
        raise ConfigError(
            f"--ranks-per-host {ranks_per_host} is for --model: without a model nothing is planned for a host",
            path="--ranks-per-host",
        )
    world, _ = _ranks(world_size)
    found = run(file, model, world, ranks_per_host or world)
    if as_json:
        _print_json(dataclasses.asdict(found) | {"ok": found.ok})
    else:
        for problem in found.problems:
            print(f"{problem.where}: {problem.what}")
        for line in found.facts:
            print(line)
        for line in found.notes:
            print(f"note: {line}")
        print("ok" if found.ok else _counted(len(found.problems), "problem"))
    return 0 if found.ok else 1


@config.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors and other programs."""
    from zeroxide.config.schema import schema as made

    _print_json(made())


def _ranks(asked: int | None) -> tuple[int, str]:
    """How many ranks, and who says so. Raises RanksError for variables of a launcher that contradict one another."""
    if asked is not None:
        return asked, "--world-size"
    launch = read_environment(os.environ)
    return launch.world, "no launcher" if launch.launcher == "none" else f"the variables of {launch.launcher}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _shown(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))

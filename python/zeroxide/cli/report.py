"""`zeroxide report`: the page about a run, as `zeroxide train` leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroxide.errors import ConfigError, StorageError

__all__ = ["report"]


def report(
    folder: Annotated[str, typer.Argument(help="Folder of the run, with its log.jsonl.", metavar="FOLDER")],
) -> None:
    """Write the page about a run into its folder: report.html, one file that needs no network.

    `zeroxide train` does so whenever it ends. A run that was killed, or is still going on, has a page by this.
    """
    from zeroxide.cli.page.document import page

    log, target = Path(folder, "log.jsonl"), Path(folder, "report.html")
    if not log.is_file():
        raise ConfigError(f"{folder} holds no run (no log.jsonl)", path="folder")
    aside = target.with_name("report.html.writing")
    try:
        aside.write_text(page(log, Path(folder, "trace.json")), encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", path=target, errno=error.errno) from None
    print(target, flush=True)

"""`zeroxide convert`: checkpoints of DeepSpeed into zeroxide's and back, and either into a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


def convert(
    source: Annotated[str, typer.Argument(help="Directory of checkpoints, or one checkpoint in it.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="Directory to write to.", metavar="TARGET")],
    to: Annotated[
        str | None,
        typer.Option(
            help="checkpoint, universal (DeepSpeed's), or a model in fp32, bf16 or fp16. Default: checkpoint from "
            "DeepSpeed's, else fp32.",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Which checkpoint. Default: the newest.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    exclude_frozen: Annotated[
        bool, typer.Option("--exclude-frozen", help="Leave out the weights of frozen parameters.")
    ] = False,
) -> None:
    """Convert a checkpoint: DeepSpeed's into zeroxide's or back, or either into safetensors for Hugging Face.

    Of DeepSpeed's, ZeRO-1, 2 and 3 and universal ones are read, and universal ones are written.
    Pickles are read without running anything that they contain.
    """
    # Only now, so that help and a wrong option cost no start of torch.
    from zeroxide.checkpoint.convert.convert import convert as run

    path, notes = run(Path(source), Path(target), to, tag, include_frozen=not exclude_frozen)
    if as_json:
        print(json.dumps({"path": str(path), "notes": notes}, indent=1))
        return
    for note in notes:
        print(f"zeroxide: note: {note}", flush=True)
    print(path, flush=True)

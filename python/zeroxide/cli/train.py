"""`zeroxide train`: train a language model on text, under a memory budget."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import Annotated, Any, get_type_hints

import typer

from zeroxide.cli.training.options import TrainOptions
from zeroxide.distributed.launch import read_environment

__all__ = ["train"]

_PATHS = "More --data, so that a shell may expand a glob."
_MODEL, _DATA, _MEMORY, _OUTPUT = "Model and training", "Data", "Memory and disk", "Output"
_JSON = Annotated[
    bool, typer.Option("--json", help="Print events as JSON, one a line, as the log has them.", rich_help_panel=_OUTPUT)
]

# Option -> panel of the help, and what it says. Names, types and defaults are those of `TrainOptions`.
_OPTIONS = {
    "model": (_MODEL, "Preset or Hugging Face model directory."),
    "data": (_DATA, "Files, folders or globs of text; may be repeated. Default: Python's standard library."),
    "offload": (_MEMORY, "Where parameters and optimizer state live: none, cpu, nvme:DIR."),
    "host_memory": (_MEMORY, "Budget for this process's resident memory, as 2GiB."),
    "steps": (_MODEL, "Optimizer steps."),
    "batch_size": (_MODEL, "Sequences per micro-batch."),
    "seq_len": (_MODEL, "Tokens per sequence."),
    "lr": (_MODEL, "Peak learning rate."),
    "bias_lr": (_MODEL, "Peak learning rate of biases, from scratch."),
    "warmup": (_MODEL, "Steps of linear warm-up. Default: a third of the run, at most 100."),
    "schedule": (_MODEL, "After warm-up: cosine, linear or constant."),
    "weight_decay": (_MODEL, "AdamW's decay of matrices."),
    "clip": (_MODEL, "Largest global gradient norm; 0: no limit."),
    "accumulate": (_MODEL, "Micro-batches per step."),
    "dtype": (_MODEL, "Compute in bf16, fp16 or fp32."),
    "seed": (_MODEL, "Decides initial weights, data order and dropout."),
    "eval_every": (_OUTPUT, "Held-out loss every N steps; 0: only at the end."),
    "eval_batches": (_OUTPUT, "Batches in one held-out loss."),
    "save_every": (_OUTPUT, "Checkpoint every N steps and at the end; 0: only when stopped."),
    "durable_every": (_OUTPUT, "Commit all state on disk every N steps, to go on from after a kill; 0: never."),
    "out": (_OUTPUT, "Run folder. Default: runs/MODEL."),
    "resume": (_OUTPUT, "Go on with the run in --out."),
    "sample_prompt": (_OUTPUT, "Text to go on from at the end."),
    "sample_tokens": (_OUTPUT, "Tokens to generate at the end; 0: none."),
    "threads": (_MEMORY, "Compute threads; 0: all the process may use."),
    "format": (_MEMORY, "Optimizer state format: split, fp32, split-bf16 or compact. Default: split with bf16."),
    "activation_checkpointing": (_MEMORY, "Compute activations again in backward."),
    "recompute": (_MEMORY, "Blocks that compute activations again: none, all, how many, or auto with --host-memory."),
    "activation_path": (_MEMORY, "Directory for activations; with --host-memory, for those without room there."),
    "loss_chunk": (_MEMORY, "Vocabulary columns that have logits at a time; 0: all."),
    "row_bytes": (_MEMORY, "Largest block of rows of embedding and output projection, as 64MiB. Default: all rows."),
    "update_in_backward": (_MEMORY, "Backward updates weights: never, always, or adaptive while that saves bytes."),
    "trace": (_OUTPUT, "Steps of the report's timeline, FIRST:LAST, or none. Default: the newest two."),
    "io_engine": (_MEMORY, "Disk queue: auto, io_uring or threads."),
}


def train(context: typer.Context, paths: list[str] | None, resume: bool, as_json: bool, **given: Any) -> int:
    """Train a language model on text, with its parameters and optimizer state where you say.

    \b
    zeroxide train --model gpt2 --offload nvme:/mnt/fast --host-memory 2GiB --steps 300
    torchrun --nproc-per-node 2 -m zeroxide.cli train --model gpt2
    """
    options = TrainOptions(**{**given, "data": (*(given["data"] or ()), *(paths or ()))})
    explicit = {
        name
        for name in options.as_json()
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE"
    }
    if paths:
        explicit.add("data")
    if not resume:
        options.checked()  # before torch is imported: a wrong option is answered at once, and so are wrong variables
    read_environment(os.environ)
    from zeroxide.cli.training.job import run

    return run(options, resume=resume, explicit=frozenset(explicit), as_json=as_json)


def _parameters() -> list[inspect.Parameter]:
    """What typer makes the command's options from: one parameter for each of `_OPTIONS`."""
    hints: dict[str, Any] = {**get_type_hints(TrainOptions), "data": list[str] | None, "resume": bool}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    defaults |= {"data": None, "resume": False}
    keyword = inspect.Parameter.KEYWORD_ONLY
    argument = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help=_PATHS, show_default=False)]
    made = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter("paths", keyword, annotation=argument, default=None),
    ]
    made.append(inspect.Parameter("as_json", keyword, annotation=_JSON, default=False))
    for name, (panel, text) in _OPTIONS.items():
        # A switch has no --no- form.
        words = [f"--{name.replace('_', '-')}"] if hints[name] is bool else []
        option = typer.Option(*words, help=text, rich_help_panel=panel, show_default=defaults[name] is not None)
        made.append(inspect.Parameter(name, keyword, annotation=Annotated[hints[name], option], default=defaults[name]))
    return made


train.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
train.__annotations__ = {each.name: each.annotation for each in _parameters()} | {"return": int}

"""`zeroxide train`: train a language model on text, under a memory budget."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from zeroxide.cli.training.options import TrainOptions
from zeroxide.distributed.launch import read_environment
from zeroxide.errors import RanksError

__all__ = ["train"]

_DEFAULT = TrainOptions()
_MODEL, _DATA, _MEMORY, _OUTPUT = "Model and training", "Data", "Memory and disk", "Output"


def train(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH]...", help="More --data, so that a shell may expand a glob.", show_default=False),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Preset or Hugging Face model directory.", rich_help_panel=_MODEL)
    ] = _DEFAULT.model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, folders or globs of text; may be repeated. Default: Python's standard library.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(help="Where parameters and optimizer state live: none, cpu, nvme:DIR.", rich_help_panel=_MEMORY),
    ] = _DEFAULT.offload,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Budget for this process's resident memory, as 2GiB.", rich_help_panel=_MEMORY),
    ] = _DEFAULT.host_memory,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=_MODEL)] = _DEFAULT.steps,
    batch_size: Annotated[
        int, typer.Option(help="Sequences per micro-batch.", rich_help_panel=_MODEL)
    ] = _DEFAULT.batch_size,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=_MODEL)] = _DEFAULT.seq_len,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_MODEL)] = _DEFAULT.lr,
    bias_lr: Annotated[
        float, typer.Option(help="Peak learning rate of biases, from scratch.", rich_help_panel=_MODEL)
    ] = _DEFAULT.bias_lr,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Steps of linear warm-up. Default: a third of the run, at most 100.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = _DEFAULT.warmup,
    schedule: Annotated[
        str, typer.Option(help="After warm-up: cosine, linear or constant.", rich_help_panel=_MODEL)
    ] = _DEFAULT.schedule,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's decay of matrices.", rich_help_panel=_MODEL)
    ] = _DEFAULT.weight_decay,
    clip: Annotated[
        float, typer.Option(help="Largest global gradient norm; 0: no limit.", rich_help_panel=_MODEL)
    ] = _DEFAULT.clip,
    accumulate: Annotated[
        int, typer.Option(help="Micro-batches per step.", rich_help_panel=_MODEL)
    ] = _DEFAULT.accumulate,
    dtype: Annotated[str, typer.Option(help="Compute in bf16, fp16 or fp32.", rich_help_panel=_MODEL)] = _DEFAULT.dtype,
    seed: Annotated[
        int, typer.Option(help="Decides initial weights, data order and dropout.", rich_help_panel=_MODEL)
    ] = _DEFAULT.seed,
    eval_every: Annotated[
        int, typer.Option(help="Held-out loss every N steps; 0: only at the end.", rich_help_panel=_OUTPUT)
    ] = _DEFAULT.eval_every,
    eval_batches: Annotated[
        int, typer.Option(help="Batches in one held-out loss.", rich_help_panel=_OUTPUT)
    ] = _DEFAULT.eval_batches,
    save_every: Annotated[
        int,
        typer.Option(help="Checkpoint every N steps and at the end; 0: only when stopped.", rich_help_panel=_OUTPUT),
    ] = _DEFAULT.save_every,
    out: Annotated[
        str | None,
        typer.Option(help="Run folder. Default: runs/MODEL.", show_default=False, rich_help_panel=_OUTPUT),
    ] = _DEFAULT.out,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_OUTPUT)
    ] = False,
    sample_prompt: Annotated[
        str | None,
        typer.Option(help="Text to go on from at the end.", show_default=False, rich_help_panel=_OUTPUT),
    ] = _DEFAULT.sample_prompt,
    sample_tokens: Annotated[
        int, typer.Option(help="Tokens to generate at the end; 0: none.", rich_help_panel=_OUTPUT)
    ] = _DEFAULT.sample_tokens,
    threads: Annotated[
        int, typer.Option(help="Compute threads; 0: all the process may use.", rich_help_panel=_MEMORY)
    ] = _DEFAULT.threads,
    format: Annotated[
        str | None,
        typer.Option(
            help="Optimizer state format: split or fp32. Default: split with bf16.",
            show_default=False,
            rich_help_panel=_MEMORY,
        ),
    ] = _DEFAULT.format,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing", help="Compute activations again in backward.", rich_help_panel=_MEMORY
        ),
    ] = _DEFAULT.activation_checkpointing,
    io_engine: Annotated[
        str, typer.Option(help="Disk queue: auto, io_uring or threads.", rich_help_panel=_MEMORY)
    ] = _DEFAULT.io_engine,
) -> int:
    """Train a language model on text, with its parameters and optimizer state where you say.

    \b
    zeroxide train --model gpt2 --offload nvme:/mnt/fast --host-memory 2GiB --steps 300
    """
    options = TrainOptions(
        model=model,
        data=(*(data or ()), *(paths or ())),
        offload=offload,
        host_memory=host_memory,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        bias_lr=bias_lr,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        dtype=dtype,
        seed=seed,
        eval_every=eval_every,
        eval_batches=eval_batches,
        save_every=save_every,
        out=out,
        sample_prompt=sample_prompt,
        sample_tokens=sample_tokens,
        threads=threads,
        format=format,
        activation_checkpointing=activation_checkpointing,
        io_engine=io_engine,
    )
    explicit = {
        name
        for name in options.as_json()
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE"
    }
    if paths:
        explicit.add("data")
    if not resume:
        options.checked()  # before torch is imported: a wrong option is answered at once
    _only_one()
    from zeroxide.cli.training.job import run

    return run(options, resume=resume, explicit=frozenset(explicit))


def _only_one() -> None:
    """Each of several ranks would write the same files: refused before anything is read."""
    world = read_environment(os.environ).world
    if world > 1:
        raise RanksError(
            f"zeroxide train is one process, and the environment names {world} ranks: start it without a launcher; "
            "for several ranks write a script around zeroxide.initialize"
        )

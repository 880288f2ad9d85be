"""The end of a run: held-out loss, a model that `transformers` loads, a sample, a plot, and what memory it took."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from zeroxide.cli.training import plot
from zeroxide.cli.training.achieved import STEPS_UNTIL_STEADY, say_planned, say_wear
from zeroxide.cli.training.dataset import Dataset
from zeroxide.cli.training.report import describe_memory
from zeroxide.cli.training.running import Running
from zeroxide.config.sizes import format_bytes
from zeroxide.errors import DataError, StorageError

__all__ = ["conclude", "encode_prompt", "evaluate", "reached", "write_page"]

_PROMPT_TOKENS = 12


def conclude(this: Running) -> None:
    """Measure, save and show the trained model."""
    options, reporter, engine = this.options, this.reporter, this.engine
    loss = evaluate(this)
    if loss is None and not this.together.stopping:
        reporter.say("no held-out loss: the held-out text is too short")
    _save_model(this)
    if options.sample_tokens and not this.together.stopping:
        _sample(this)
    plotted = _plot(this) if this.together.first else None
    memory = engine.memory()
    expected = engine.plan().expected_peaks(loaded=this.loaded)
    if this.expected_process is not None:
        expected["process"] = this.expected_process
    for number, line in enumerate(describe_memory(expected, memory)):
        reporter.say(f"  {'memory' if number == 0 else '':<9} {line}")
    device = engine.device_memory()
    planned = {name: usage["planned"] for name, usage in device.items() if isinstance(usage, dict)}
    for number, line in enumerate(describe_memory(planned, device)):
        reporter.say(f"  {'device' if number == 0 else '':<9} {line}")
    _say_traffic(this)
    say_wear(this)
    say_planned(this)
    peak, limit = int(memory["process"]["peak"]), memory.get("limit")
    reporter.say(f"peak resident memory {format_bytes(peak)}" + (f" of {format_bytes(limit)}" if limit else ""))
    reporter.say(
        f"model in {this.folder.model}, log in {this.folder.log}" + (f", plot in {plotted}" if plotted else "")
    )
    reporter.event(
        "end", step=this.step, loss=loss, peak_rss=peak, limit=limit, expected=expected, reached=reached(memory)
    )


def reached(memory: dict[str, Any]) -> dict[str, int]:
    """The peak of each bucket and of the process, of what `engine.memory()` tells."""
    return {name: int(usage["peak"]) for name, usage in memory.items() if isinstance(usage, dict)}


def write_page(this: Running) -> None:
    """Have the page about the run written, by a program of its own: its memory is not the training process's.

    A page that cannot be had costs the page, not the run.
    """
    command = [sys.executable, "-P", "-m", "zeroxide.cli", "report", str(this.folder.path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        this.reporter.say(f"report in {this.folder.report}")
        return
    reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
    this.reporter.say(f"no report: {reason}")


def _say_traffic(this: Running) -> None:
    """Report what a step moved to and from the disk, the median of those after the first, beside what was expected."""
    steady = this.traffic[STEPS_UNTIL_STEADY:]
    read, written = this.engine.plan().expected_traffic()
    if not steady or not (read or written) or this.options.accumulate > 1:
        return
    took_read, took_written = (sorted(each)[len(steady) // 2] for each in zip(*steady, strict=True))
    this.reporter.say(
        f"  disk      a step reads {format_bytes(took_read)} and writes {format_bytes(took_written)}, "
        f"expected {format_bytes(read)} and {format_bytes(written)}"
    )
    this.reporter.event("traffic", step=this.step, expected=[read, written], took=[took_read, took_written])


def _save_model(this: Running) -> None:
    """Write a folder that `transformers` loads, aside and then by one rename."""
    aside = this.folder.model.with_name("model.writing")
    this.together.from_first(lambda: _describe_model(this, aside))
    this.engine.save_16bit_model(str(aside))
    this.together.from_first(lambda: _rename(aside, this.folder.model))


def _describe_model(this: Running, aside: Path) -> None:
    """Writes all but the weights."""
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(this.data.tokenizer_folder, aside)
        config = this.model.config
        config.architectures = [type(this.model).__name__]
        config.dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[this.options.dtype]
        config.save_pretrained(aside)
        if this.model.generation_config is not None:
            this.model.generation_config.save_pretrained(aside)
    except OSError as error:
        raise _not_written(this.folder.model, error) from None


def _rename(aside: Path, target: Path) -> None:
    try:
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except OSError as error:
        raise _not_written(target, error) from None


def _not_written(target: Path, error: OSError) -> StorageError:
    line = f"cannot write the model to {target}: {error.strerror or error}"
    return StorageError(line, path=target, errno=error.errno)


def _tokenizer(data: Dataset) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))


def encode_prompt(data: Dataset, text: str) -> list[int]:
    """Return the tokens of a prompt. Raises `DataError` where it has none."""
    ids: list[int] = _tokenizer(data).encode(text, add_special_tokens=False).ids
    if not ids:
        raise DataError("--sample-prompt holds no tokens")
    return ids


def _sample(this: Running) -> None:
    from zeroxide.cli.training.sample import generate

    options, data = this.options, this.data
    longest = this.choice.longest_sequence
    room = options.sample_tokens if longest is None else min(options.sample_tokens, longest - 1)
    if options.sample_prompt:
        prompt = encode_prompt(data, options.sample_prompt)
    else:
        source = data.held_out if data.held_out.count else data.train
        prompt = source.read(0, min(_PROMPT_TOKENS, source.count)).tolist()
    if longest is not None:
        prompt = prompt[-(longest - room) :]
    tokens = generate(
        this.engine,
        prompt,
        count=room,
        vocabulary_size=data.vocabulary_size,
        end_of_text=data.end_of_text,
        seed=options.seed,
        stop=lambda: this.together.stopping,
    )
    tokenizer = _tokenizer(data)
    begin, text = tokenizer.decode(prompt), tokenizer.decode(tokens)
    this.reporter.say("sample:")
    for line in (begin + text).splitlines():
        this.reporter.say(f"  | {line}")
    this.reporter.event("sample", step=this.step, prompt=begin, text=text)


def _plot(this: Running) -> Path | None:
    """Draw the loss curve. A missing or failing matplotlib costs the picture, not the run."""
    command = [sys.executable, "-P", plot.__file__, str(this.folder.log), str(this.folder.plot)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        return this.folder.plot
    reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
    this.reporter.say(f"no loss plot: {reason}")
    return None


def evaluate(this: Running) -> float | None:
    """Report the held-out loss and return it; None where there is no held-out text or a signal came in between."""
    from zeroxide.cli.training.sample import held_out_loss

    begin = time.perf_counter()
    loss = held_out_loss(this.engine, this.held_out, lambda: this.together.stopping)
    if loss is None:
        return None
    perplexity = math.exp(min(loss, 700.0))
    this.reporter.say(f"held-out loss {loss:.4f} (perplexity {perplexity:,.1f}) after step {this.step}")
    this.reporter.event("eval", step=this.step, loss=loss, perplexity=perplexity, seconds=time.perf_counter() - begin)
    return loss

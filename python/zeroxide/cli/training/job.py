"""One run of `zeroxide train`, from options to a folder with a trained model.

    Preparation: run folder -> model on the meta device -> tokens -> engine -> checkpoint, when resuming
    Training:    step, step, ... with held-out losses and checkpoints in between
    Conclusion:  held-out loss, model folder, sample, plot
    Always:      the page about the run

Whatever ends the run early leaves the last committed checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroxide.cli.training.achieved import planned_for
from zeroxide.cli.training.batches import HeldOutBatches, TrainingBatches
from zeroxide.cli.training.conclusion import conclude, encode_prompt, evaluate, reached, write_page
from zeroxide.cli.training.corpus import Corpus, gather
from zeroxide.cli.training.dataset import Dataset, open_dataset, prepare_dataset
from zeroxide.cli.training.engine_setup import make_engine
from zeroxide.cli.training.facts import facts_of
from zeroxide.cli.training.going_on import durable_name, go_on, note_for_commit
from zeroxide.cli.training.interrupt import StopRequest
from zeroxide.cli.training.models import ModelChoice, build_model, choose_model, num_parameters
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.recompute import with_blocks_chosen
from zeroxide.cli.training.report import Reporter, StepFigures
from zeroxide.cli.training.run_folder import Record, RunFolder, refuse_differences
from zeroxide.cli.training.running import Running
from zeroxide.cli.training.together import Together
from zeroxide.cli.training.tracing import Tracing
from zeroxide.config.sizes import format_bytes
from zeroxide.distributed import Ranks
from zeroxide.distributed.process_group import start
from zeroxide.errors import ConfigError, ModelError, NumericsError

__all__ = ["run"]


def run(
    options: TrainOptions,
    *,
    resume: bool = False,
    explicit: frozenset[str] = frozenset(),
    as_json: bool = False,
    initialize: Callable[..., Any] | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Train as `options` say and return the exit status: 0, or 128 + the signal that stopped the run after a step.

    With `resume`, go on with the run in `--out`: options not in `explicit` are those of that run. With `as_json` the
    events are printed instead of lines for people. `initialize` stands in for `zeroxide.initialize`. Raises
    `ZeroxideError`.
    """
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        reporter = reporter or Reporter(as_json=as_json)
        cleanup.callback(reporter.close)
        ranks = start()
        cleanup.callback(ranks.close)
        together = Together(ranks, stop)
        if not together.first:
            reporter = Reporter(cleanup.enter_context(open(os.devnull, "w", encoding="utf-8")))
        this, notes = _prepare(options, resume, explicit, initialize, reporter, together, cleanup)
        if together.first:
            reporter.open_log(this.folder.log, append=resume)
        _announce(this, notes)
        stop.defer()
        try:
            _train(this)
            if together.stopping:
                return _stop_early(this)
            _finish_saving(this)
            conclude(this)
        except KeyboardInterrupt:
            reporter.event("interrupted", step=this.step, saved_step=this.saved_step)
            raise
        except Exception as error:
            reporter.event("error", step=this.step, message=" ".join(str(error).split()))
            raise
        finally:
            if together.first:
                write_page(this)
        return 0


@dataclass(frozen=True)
class _Begun:
    """What rank 0 finds or makes before there is an engine, and the others open."""

    folder: RunFolder
    options: TrainOptions
    choice: ModelChoice
    data: Dataset
    record: Record


def _prepare(
    options: TrainOptions,
    resume: bool,
    explicit: frozenset[str],
    initialize: Callable[..., Any] | None,
    reporter: Reporter,
    together: Together,
    cleanup: contextlib.ExitStack,
) -> tuple[Running, list[str]]:
    """Return the run, ready for its next step, and what else to tell the user. `cleanup` gets what must be closed."""
    mine: list[_Begun] = []

    def first() -> list[Any]:
        mine.append(_begin(options, resume, explicit, reporter, together.ranks, cleanup))
        return [str(mine[0].folder.path), mine[0].options.as_json()]

    path, told = together.from_first(first)
    begun = mine[0] if mine else _join(path, TrainOptions.from_json(told), together.ranks, cleanup)
    options, choice, data = begun.options, begun.choice, begun.data
    import torch

    torch.set_num_threads(options.threads)
    batches = TrainingBatches(data.train, batch_size=options.batch_size, seq_len=options.seq_len, seed=options.seed)
    held_out = HeldOutBatches(
        data.held_out, batch_size=options.batch_size, seq_len=options.seq_len, limit=options.eval_batches
    )
    _fit_config(choice, data)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    model = build_model(choice, dtypes[options.dtype])
    count = num_parameters(model)  # the engine takes the shapes away
    engine, notes = make_engine(options, choice, model, initialize, durable_name(begun.folder.path))
    cleanup.callback(engine.destroy)
    this = Running(options, begun.folder, reporter, together, choice, data, engine, model, count, batches, held_out)
    plan = engine.plan()
    this.planned = planned_for(
        options,
        begun.record,
        ranks_here=together.ranks.local_world,
        recomputed=len(plan.recompute.names),
        early=plan.early.updates,
    )
    if resume:
        go_on(this, begun.record)
    this.seen.append(engine.memory()["process"])
    return this, notes


def _begin(
    options: TrainOptions,
    resume: bool,
    explicit: frozenset[str],
    reporter: Reporter,
    ranks: Ranks,
    cleanup: contextlib.ExitStack,
) -> _Begun:
    """On rank 0: opens the run's folder, checks the options, and has the tokens made where they are not there."""
    recorded: Record | None = None
    folder: RunFolder | None = None
    if resume:
        folder = RunFolder.resume(options.out, options.model)
        cleanup.callback(folder.close)
        recorded = folder.read_record()
        options = _merge(recorded.options, options, explicit)
    options = options.checked(ranks.local_world)
    import torch

    torch.set_num_threads(options.threads)
    choice = choose_model(options.model)
    _check_length(options, choice)
    options = with_blocks_chosen(options, choice, ranks, reporter.say)
    # On resume the tokens in the folder are the run's data; the files they were made from need not be here any more.
    corpus = None if resume and "data" not in explicit else gather(options.data)
    if folder is None:
        folder = RunFolder.create(options.out, options.model)
        cleanup.callback(folder.close)
    data = open_dataset(folder.data) if corpus is None else _tokens(options, folder, choice, corpus, recorded, reporter)
    cleanup.callback(data.close)
    if data.vocabulary_size > choice.vocabulary_size:
        raise ModelError(
            f"the tokenizer has {data.vocabulary_size:,} tokens, the embedding of {choice.name} only "
            f"{choice.vocabulary_size:,} rows"
        )
    # A corpus that is too short is found out before there is a record of the run.
    TrainingBatches(data.train, batch_size=options.batch_size, seq_len=options.seq_len, seed=options.seed)
    if options.sample_prompt is not None:
        encode_prompt(data, options.sample_prompt)  # an empty one should not be found out at the end
    record = Record(options, choice.digest(), data.corpus_digest, ranks.world)
    if recorded is not None:
        refuse_differences(recorded, record)
    else:
        folder.write_record(record)
    return _Begun(folder, options, choice, data, record)


def _join(path: str, options: TrainOptions, ranks: Ranks, cleanup: contextlib.ExitStack) -> _Begun:
    """On the other ranks: opens what rank 0 has made. Raises DataError where they do not see its folder."""
    folder, choice = RunFolder(Path(path), shared=True), choose_model(options.model)
    data = open_dataset(folder.data)
    cleanup.callback(data.close)
    return _Begun(folder, options, choice, data, Record(options, choice.digest(), data.corpus_digest, ranks.world))


def _merge(recorded: TrainOptions, given: TrainOptions, explicit: frozenset[str]) -> TrainOptions:
    """Return the recorded options with those the user gave now put over them."""
    fields = recorded.as_json()
    fields.update({name: value for name, value in given.as_json().items() if name in explicit})
    fields["data"] = list(fields["data"])
    return TrainOptions.from_json(fields)


def _check_length(options: TrainOptions, choice: ModelChoice) -> None:
    longest = choice.longest_sequence
    if longest is not None and options.seq_len > longest:
        raise ConfigError(
            f"--seq-len {options.seq_len} is longer than {choice.name} can take ({longest})", path="seq_len"
        )


def _tokens(
    options: TrainOptions,
    folder: RunFolder,
    choice: ModelChoice,
    corpus: Corpus,
    recorded: Record | None,
    reporter: Reporter,
) -> Dataset:
    if corpus.num_skipped:
        reporter.say(f"data: {corpus.num_skipped} files are not text and were left out")
    if recorded is not None and corpus.digest() != recorded.corpus_digest:
        # Refused before the tokens of the run would be replaced by those of another text.
        raise ConfigError("--resume: the text of --data is not what the run began with", path="data")
    return prepare_dataset(
        folder.data,
        corpus,
        tokenizer=choice.directory if choice.has_tokenizer else None,
        vocabulary_size=choice.vocabulary_size,
        threads=options.threads,
        say=reporter.say,
    )


def _fit_config(choice: ModelChoice, data: Dataset) -> None:
    """Let a preset's config name the special tokens of the tokenizer that was trained for it."""
    if choice.directory is None or not choice.has_tokenizer:
        for name in ("bos_token_id", "eos_token_id"):
            setattr(choice.config, name, data.end_of_text)


def _announce(this: Running, notes: list[str]) -> None:
    options, choice, data = this.options, this.choice, this.data
    origin = "fine-tuned" if choice.has_weights else "from scratch"
    biases = "" if choice.has_weights else f" (biases {options.bias_lr:g})"
    plan, world = this.engine.plan(), this.together.world
    ranks = f" on {world} ranks" if world > 1 else ""
    rows = [
        ("model", f"{choice.name}, {this.num_parameters:,} parameters, {options.dtype}, {origin}"),
        (
            "data",
            f"{data.description}: {data.num_documents:,} files, {data.train.count:,} tokens to train on, "
            f"{data.held_out.count:,} held out, vocabulary {data.vocabulary_size:,}",
        ),
        (
            "training",
            f"{options.steps} steps of {options.tokens_per_step * world:,} tokens "
            f"({options.batch_size} x {options.seq_len} x {options.accumulate}{ranks}), AdamW, "
            f"lr {options.lr:g}{biases} {options.schedule} after {options.warmup} steps, clip {options.clip:g}, "
            f"seed {options.seed}",
        ),
        ("disk", str(this.engine.io().get("engine", ""))),
    ]
    rows += [("plan" if number == 0 else "", line) for number, line in enumerate(plan.describe())]
    rows += [("note" if number == 0 else "", line) for number, line in enumerate(notes)]
    rows.append(("run", f"{this.folder.path}" + (f", going on after step {this.step}" if this.step else "")))
    this.reporter.banner([row for row in rows if row[1]])
    this.reporter.event(
        "start",
        step=this.step,
        parameters=this.num_parameters,
        options=options.as_json(),
        model=choice.name,
        plan=plan.describe(),
        facts=facts_of(this) if this.together.first else None,
    )


def _train(this: Running) -> None:
    options = this.options
    this.reporter.start(this.step, options.steps)
    try:
        with _tracing(this) as tracing:
            while this.step < options.steps and not this.together.stopping:
                tracing.before_step(this.step + 1)
                figures = _one_step(this)
                this.step += 1
                this.reporter.step(figures, options.steps)
                last = this.step == options.steps
                tracing.after_step(this.step)
                if options.eval_every and this.step % options.eval_every == 0 and not last:
                    evaluate(this)
                if options.save_every and (last or this.step % options.save_every == 0):
                    _save_checkpoint(this)
    finally:
        this.reporter.stop()


def _tracing(this: Running) -> Tracing:
    """What records steps: of rank 0, which writes all that the run leaves."""

    def done(first: int, last: int) -> None:
        this.reporter.event("trace", step=this.step, first=first, last=last)

    options = this.options if this.together.first else dataclasses.replace(this.options, trace="none")
    return Tracing(this.engine, this.folder.trace, options, this.reporter.say, done)


def _one_step(this: Running) -> StepFigures:
    import torch

    options, engine = this.options, this.engine
    before, begin = engine.io(), time.perf_counter()
    forward = backward = update = 0.0
    mean_loss = 0.0
    lr = float(engine.get_lr()[0])
    for micro in range(options.accumulate):
        # One after the other as one rank would take them, so that so many ranks see what so many micro-batches would.
        number = (this.step * options.accumulate + micro) * this.together.world + this.together.ranks.rank
        # Dropout is a function of the seed and of the batch's number, so a resumed run needs no generator state.
        torch.manual_seed(_seed_of(options.seed, number))
        batch = this.batches.batch(number).to(engine.device)
        start = time.perf_counter()
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        value = float(loss.detach())
        forward += time.perf_counter() - start
        if len(this.seen) == 1:
            this.seen.append(engine.memory()["process"])
        if not math.isfinite(value):
            raise NumericsError(
                f"the loss is {value} at step {this.step + 1}; {_last_checkpoint(this)}", step=this.step, value=value
            )
        start = time.perf_counter()
        engine.backward(loss)
        backward += time.perf_counter() - start
        if this.expected_process is None:
            _expect(this)
        del loss
        start = time.perf_counter()
        note_for_commit(this)
        engine.step()
        update += time.perf_counter() - start
        mean_loss += value / options.accumulate
    norm = engine.get_global_grad_norm()
    norm = None if norm is None else float(norm)
    # In fp16 such a step is left out and the next loss scaled less; the engine ends the run when that does not help.
    if norm is not None and not math.isfinite(norm) and options.dtype != "fp16":
        raise NumericsError(
            f"the gradient norm is {norm} at step {this.step + 1}; {_last_checkpoint(this)}", step=this.step, value=norm
        )
    mean_loss = this.together.step(mean_loss)
    seconds, after, memory = time.perf_counter() - begin, engine.io(), engine.memory()
    this.traffic.append((after["read_bytes"] - before["read_bytes"], after["write_bytes"] - before["write_bytes"]))
    this.phases.append((forward + update, backward))
    busy = sum(after[key] - before[key] for key in ("read_seconds", "write_seconds"))
    return StepFigures(
        step=this.step + 1,
        loss=mean_loss,
        grad_norm=norm,
        lr=lr,
        tokens=options.tokens_per_step * this.together.world,
        seconds=seconds,
        forward_seconds=forward,
        backward_seconds=backward,
        step_seconds=update,
        rss=int(memory["process"]["rss"]),
        peak_rss=int(memory["process"]["peak"]),
        limit=memory.get("limit"),
        read_bytes=after["read_bytes"] - before["read_bytes"],
        write_bytes=after["write_bytes"] - before["write_bytes"],
        io_busy_seconds=busy,
        io_wait_seconds=after["wait_seconds"] - before["wait_seconds"],
        applied=bool(engine.was_step_applied()),
    )


def _expect(this: Running) -> None:
    """Say what training will take at the most: weights, gradients and activations have now been resident together."""
    engine = this.engine
    made, forward = this.seen
    this.expected_process = engine.plan().expected_process(
        made, forward, engine.memory()["process"], loaded=this.loaded
    )
    this.reporter.say(f"expected at most {format_bytes(this.expected_process)} resident, by what one backward took")
    this.reporter.event("expected", step=this.step, process=this.expected_process)


def _seed_of(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"dropout {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _last_checkpoint(this: Running) -> str:
    if this.saved_step >= 0:
        return f"the checkpoint of step {this.saved_step} is intact"
    return "there is no checkpoint yet (see --save-every)"


def _save_checkpoint(this: Running) -> None:
    begin = time.perf_counter()
    state = {"step": this.step, "micro_batches": this.step * this.options.accumulate, "corpus": this.data.corpus_digest}
    this.engine.save_checkpoint(str(this.folder.checkpoint_folder), tag=f"step-{this.step}", client_state=state)
    this.saved_step = this.step
    if this.together.first:
        this.folder.drop_old_checkpoints()
    seconds = time.perf_counter() - begin
    this.reporter.say(f"checkpoint of step {this.step} in {this.folder.checkpoint_folder} ({seconds:.1f} s)")
    this.reporter.event("checkpoint", step=this.step, seconds=seconds)


def _finish_saving(this: Running) -> None:
    """A durable run writes its checkpoints while it goes on. Raises CheckpointError where that has failed."""
    if this.options.durable_every:
        this.engine.wait_for_checkpoint()


def _stop_early(this: Running) -> int:
    if this.saved_step != this.step:
        _save_checkpoint(this)
    _finish_saving(this)
    stop = this.together.stop
    this.reporter.event("stopped", step=this.step, signal=stop.name, reached=reached(this.engine.memory()))
    this.reporter.say(
        f"stopped by {stop.name} after step {this.step}; go on with: zeroxide train --resume --out {this.folder.path}"
    )
    return stop.exit_status

"""One run of `zeroxide train`, from options to a folder with a trained model.

    Preparation: run folder -> model on the meta device -> tokens -> engine -> checkpoint, when resuming
    Training:    step, step, ... with held-out losses and checkpoints in between
    Conclusion:  held-out loss, model folder, sample, plot

Whatever ends the run early leaves the last committed checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroxide.cli.training import plot
from zeroxide.cli.training.batches import HeldOutBatches, TrainingBatches
from zeroxide.cli.training.corpus import gather
from zeroxide.cli.training.dataset import Dataset, open_dataset, prepare_dataset
from zeroxide.cli.training.interrupt import StopRequest
from zeroxide.cli.training.models import ModelChoice, build_model, choose_model, num_parameters
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.report import Reporter, StepFigures, describe_memory
from zeroxide.cli.training.run_folder import Record, RunFolder, refuse_differences
from zeroxide.cli.training.schedule import fraction_of_peak
from zeroxide.config.sizes import format_bytes
from zeroxide.errors import CheckpointError, ConfigError, DataError, ModelError, NumericsError, StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["run"]

_BETAS = (0.9, 0.95)
_PROMPT_TOKENS = 12


@dataclass
class _Run:
    """What the parts of a run share once everything is prepared."""

    options: TrainOptions
    folder: RunFolder
    reporter: Reporter
    stop: StopRequest
    choice: ModelChoice
    data: Dataset
    engine: Any
    model: PreTrainedModel
    batches: TrainingBatches
    held_out: HeldOutBatches
    step: int = 0
    saved_step: int = -1


def run(
    options: TrainOptions,
    *,
    resume: bool = False,
    explicit: frozenset[str] = frozenset(),
    initialize: Callable[..., Any] | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Train as `options` say and return the exit status: 0, or 128 + the signal that stopped the run after a step.

    With `resume`, go on with the run in `--out`: options not in `explicit` are those of that run. `initialize` stands
    in for `zeroxide.initialize`. Raises `ZeroxideError`.
    """
    reporter = reporter or Reporter()
    with StopRequest() as stop:
        folder: RunFolder | None = None
        engine: Any = None
        data: Dataset | None = None
        try:
            if resume:
                folder = RunFolder.resume(options.out, options.model)
                recorded = folder.read_record()
                options = _merge(recorded.options, options, explicit)
            else:
                recorded = None
            options = options.checked()
            import torch

            torch.set_num_threads(options.threads)
            choice = choose_model(options.model)
            _check_length(options, choice)
            if folder is None:
                folder = RunFolder.create(options.out, options.model)
            data = _data(options, folder, choice, recorded, explicit, reporter)
            batches = TrainingBatches(
                data.train, batch_size=options.batch_size, seq_len=options.seq_len, seed=options.seed
            )
            held_out = HeldOutBatches(
                data.held_out, batch_size=options.batch_size, seq_len=options.seq_len, limit=options.eval_batches
            )
            if options.sample_prompt:
                _encode(data, options.sample_prompt)  # a prompt that is no text should not be found out at the end
            record = Record(options, choice.digest(), data.corpus_digest)
            if recorded is not None:
                refuse_differences(recorded, record)
            else:
                folder.write_record(record)
            _fit_config(choice, data)
            model = build_model(choice, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
            engine, source_notes = _engine(options, choice, model, initialize)
            this = _Run(options, folder, reporter, stop, choice, data, engine, model, batches, held_out)
            if resume:
                _load_checkpoint(this, record)
            reporter.open_log(folder.log, append=resume)
            _announce(this, source_notes)
            stop.defer()
            try:
                _train(this)
                if stop.requested:
                    return _stop_early(this)
                _conclude(this)
            except KeyboardInterrupt:
                reporter.event("interrupted", step=this.step, saved_step=this.saved_step)
                raise
            except Exception as error:
                reporter.event("error", step=this.step, message=" ".join(str(error).split()))
                raise
            return 0
        finally:
            reporter.close()
            if engine is not None:
                engine.destroy()
            if data is not None:
                data.close()
            if folder is not None:
                folder.close()


def _merge(recorded: TrainOptions, given: TrainOptions, explicit: frozenset[str]) -> TrainOptions:
    """Return the recorded options with those the user gave now put over them."""
    fields = recorded.as_json()
    fields.update({name: value for name, value in given.as_json().items() if name in explicit})
    fields["data"] = list(fields["data"])
    return TrainOptions.from_json(fields)


def _check_length(options: TrainOptions, choice: ModelChoice) -> None:
    longest = choice.longest_sequence
    if longest is not None and options.seq_len > longest:
        raise ConfigError(f"--seq-len {options.seq_len} is longer than {choice.name} can take ({longest})", path="seq_len")


def _data(
    options: TrainOptions,
    folder: RunFolder,
    choice: ModelChoice,
    recorded: Record | None,
    explicit: frozenset[str],
    reporter: Reporter,
) -> Dataset:
    if recorded is not None and "data" not in explicit:
        # The tokens in the folder are the run's data; the files they were made from need not be here any more.
        data = open_dataset(folder.data)
    else:
        corpus = gather(options.data)
        if corpus.num_skipped:
            reporter.say(f"data: {corpus.num_skipped} files are not text and were left out")
        if recorded is not None and corpus.digest() != recorded.corpus_digest:
            raise ConfigError("--resume: the text of --data is not what the run began with", path="data")
        data = prepare_dataset(
            folder.data,
            corpus,
            tokenizer=choice.directory if choice.has_tokenizer else None,
            vocabulary_size=choice.vocabulary_size,
            threads=options.threads,
            say=reporter.say,
        )
    if data.vocabulary_size > choice.vocabulary_size:
        raise ModelError(
            f"the tokenizer has {data.vocabulary_size:,} tokens, the embedding of {choice.name} only "
            f"{choice.vocabulary_size:,} rows"
        )
    return data


def _fit_config(choice: ModelChoice, data: Dataset) -> None:
    """Let a preset's config name the special tokens of the tokenizer that was trained for it."""
    if choice.directory is None or not choice.has_tokenizer:
        for name in ("bos_token_id", "eos_token_id"):
            setattr(choice.config, name, data.end_of_text)


def _engine(
    options: TrainOptions, choice: ModelChoice, model: PreTrainedModel, initialize: Callable[..., Any] | None
) -> tuple[Any, list[str]]:
    """Hand the model to zeroxide and return the engine, with one note per thing worth telling the user."""
    from zeroxide.cli.training.from_safetensors import FromSafetensors
    from zeroxide.cli.training.from_scratch import FromScratch
    from zeroxide.cli.training.loss import causal_lm_loss

    notes: list[str] = []
    weights: FromSafetensors | FromScratch
    if choice.has_weights and choice.directory is not None:
        weights = FromSafetensors(model, choice.directory)
        if weights.unexpected:
            more = f" and {len(weights.unexpected) - 3} more" if len(weights.unexpected) > 3 else ""
            notes.append(f"not part of this model, left out: {', '.join(weights.unexpected[:3])}{more}")
    else:
        weights = FromScratch(model, options.seed)
    model.loss_function = causal_lm_loss
    if options.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"{choice.name} does not support activation checkpointing")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if initialize is None:
        import zeroxide

        initialize = zeroxide.initialize
    engine, *_ = initialize(
        model=model,
        model_parameters=_parameter_groups(model, options),
        lr_scheduler=lambda optimizer: _scheduler(optimizer, options),
        config=_engine_config(options),
        offload=options.offload,
        host_memory=options.host_memory,
        weights=weights,
    )
    return engine, notes


def _scheduler(optimizer: torch.optim.Optimizer, options: TrainOptions) -> torch.optim.lr_scheduler.LRScheduler:
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda step: fraction_of_peak(step, options))


def _parameter_groups(model: torch.nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Split the parameters: decay matrices, leave vectors (biases, norms) alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _engine_config(options: TrainOptions) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.clip,
        "steps_per_print": math.inf,
        "bf16": {"enabled": options.dtype == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.lr, "betas": list(_BETAS), "weight_decay": options.weight_decay},
        },
        "zeroxide": {"format": options.format, "io_engine": options.io_engine, "threads": options.threads},
    }


def _load_checkpoint(this: _Run, record: Record) -> None:
    folder = this.folder
    if not folder.checkpoints():
        raise CheckpointError(f"--resume: {folder.path} holds no checkpoint", path=folder.checkpoint_folder)
    path, state = this.engine.load_checkpoint(str(folder.checkpoint_folder))
    if path is None:
        raise CheckpointError(f"--resume: no checkpoint could be loaded from {folder.checkpoint_folder}")
    step = state.get("step") if isinstance(state, dict) else None
    if not isinstance(step, int) or state.get("corpus") != record.corpus_digest:
        raise CheckpointError(f"{path} was not written by this run", path=path)
    this.step = this.saved_step = step
    if step >= this.options.steps:
        raise ConfigError(f"the run is at step {step} of {this.options.steps} already; give more --steps", path="steps")


def _announce(this: _Run, notes: list[str]) -> None:
    options, choice, data = this.options, this.choice, this.data
    origin = "fine-tuned" if choice.has_weights else "from scratch"
    count = num_parameters(this.model)
    plan = this.engine.plan()
    rows = [
        ("model", f"{choice.name}, {count:,} parameters, {options.dtype}, {origin}"),
        (
            "data",
            f"{data.description}: {data.num_documents:,} files, {data.train.count:,} tokens to train on, "
            f"{data.held_out.count:,} held out, vocabulary {data.vocabulary_size:,}",
        ),
        (
            "training",
            f"{options.steps} steps of {options.tokens_per_step:,} tokens "
            f"({options.batch_size} x {options.seq_len} x {options.accumulate}), AdamW, lr {options.lr:g} "
            f"{options.schedule} after {options.warmup} steps, clip {options.clip:g}, seed {options.seed}",
        ),
        ("disk", str(this.engine.io().get("engine", ""))),
    ]
    rows += [("plan" if number == 0 else "", line) for number, line in enumerate(plan.describe())]
    rows += [("note" if number == 0 else "", line) for number, line in enumerate(notes)]
    rows.append(("run", f"{this.folder.path}" + (f", going on after step {this.step}" if this.step else "")))
    this.reporter.banner([row for row in rows if row[1]])
    this.reporter.event(
        "start", step=this.step, parameters=count, options=options.as_json(), model=choice.name, plan=plan.describe()
    )


def _train(this: _Run) -> None:
    options = this.options
    this.reporter.start(this.step, options.steps)
    try:
        while this.step < options.steps and not this.stop.requested:
            figures = _one_step(this)
            this.step += 1
            this.reporter.step(figures, options.steps)
            last = this.step == options.steps
            if options.eval_every and this.step % options.eval_every == 0 and not last:
                _evaluate(this)
            if options.save_every and (last or this.step % options.save_every == 0):
                _save_checkpoint(this)
    finally:
        this.reporter.stop()


def _one_step(this: _Run) -> StepFigures:
    import torch

    options, engine = this.options, this.engine
    before, begin = engine.io(), time.perf_counter()
    forward = backward = update = 0.0
    mean_loss = 0.0
    lr = float(engine.get_lr()[0])
    for micro in range(options.accumulate):
        number = this.step * options.accumulate + micro
        # Dropout is a function of the seed and of the batch's number, so a resumed run needs no generator state.
        torch.manual_seed(_seed_of(options.seed, number))
        batch = this.batches.batch(number)
        start = time.perf_counter()
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        value = float(loss.detach())
        forward += time.perf_counter() - start
        if not math.isfinite(value):
            raise NumericsError(
                f"the loss is {value} at step {this.step + 1}; {_last_checkpoint(this)}", step=this.step, value=value
            )
        start = time.perf_counter()
        engine.backward(loss)
        backward += time.perf_counter() - start
        del loss
        start = time.perf_counter()
        engine.step()
        update += time.perf_counter() - start
        mean_loss += value / options.accumulate
    norm = engine.get_global_grad_norm()
    norm = None if norm is None else float(norm)
    if norm is not None and not math.isfinite(norm):
        raise NumericsError(
            f"the gradient norm is {norm} at step {this.step + 1}; {_last_checkpoint(this)}", step=this.step, value=norm
        )
    seconds, after, memory = time.perf_counter() - begin, engine.io(), engine.memory()
    busy = sum(after[key] - before[key] for key in ("read_seconds", "write_seconds"))
    return StepFigures(
        step=this.step + 1,
        loss=mean_loss,
        grad_norm=norm,
        lr=lr,
        tokens=options.tokens_per_step,
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
    )


def _seed_of(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"dropout {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _last_checkpoint(this: _Run) -> str:
    if this.saved_step >= 0:
        return f"the checkpoint of step {this.saved_step} is intact"
    return "there is no checkpoint yet (see --save-every)"


def _evaluate(this: _Run) -> float | None:
    from zeroxide.cli.training.sample import held_out_loss

    begin = time.perf_counter()
    loss = held_out_loss(this.engine, this.held_out, lambda: this.stop.requested)
    if loss is None:
        return None
    perplexity = math.exp(min(loss, 700.0))
    this.reporter.say(f"held-out loss {loss:.4f} (perplexity {perplexity:,.1f}) after step {this.step}")
    this.reporter.event(
        "eval", step=this.step, loss=loss, perplexity=perplexity, seconds=time.perf_counter() - begin
    )
    return loss


def _save_checkpoint(this: _Run) -> None:
    begin = time.perf_counter()
    state = {"step": this.step, "micro_batches": this.step * this.options.accumulate, "corpus": this.data.corpus_digest}
    this.engine.save_checkpoint(str(this.folder.checkpoint_folder), tag=f"step-{this.step}", client_state=state)
    this.saved_step = this.step
    this.folder.drop_old_checkpoints()
    seconds = time.perf_counter() - begin
    this.reporter.say(f"checkpoint of step {this.step} in {this.folder.checkpoint_folder} ({seconds:.1f} s)")
    this.reporter.event("checkpoint", step=this.step, seconds=seconds)


def _stop_early(this: _Run) -> int:
    if this.saved_step != this.step:
        _save_checkpoint(this)
    this.reporter.event("stopped", step=this.step, signal=this.stop.name)
    this.reporter.say(
        f"stopped by {this.stop.name} after step {this.step}; go on with: zeroxide train --resume --out {this.folder.path}"
    )
    return this.stop.exit_status


def _conclude(this: _Run) -> None:
    options, reporter, engine = this.options, this.reporter, this.engine
    loss = _evaluate(this)
    if loss is None and not this.stop.requested:
        reporter.say("no held-out loss: the held-out text is too short")
    _save_model(this)
    if options.sample_tokens and not this.stop.requested:
        _sample(this)
    plotted = _plot(this)
    memory = engine.memory()
    for number, line in enumerate(describe_memory(_expected_bytes(engine.plan()), memory)):
        reporter.say(f"  {'memory' if number == 0 else '':<9} {line}")
    peak, limit = int(memory["process"]["peak"]), memory.get("limit")
    reporter.say(f"peak resident memory {format_bytes(peak)}" + (f" of {format_bytes(limit)}" if limit else ""))
    reporter.say(f"model in {this.folder.model}, log in {this.folder.log}" + (f", plot in {plotted}" if plotted else ""))
    reporter.event("end", step=this.step, loss=loss, peak_rss=peak, limit=limit)


def _save_model(this: _Run) -> None:
    """Write a folder that `transformers` loads, aside and then by one rename."""
    target = this.folder.model
    aside = target.with_name("model.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(this.data.tokenizer_folder, aside)
        config = this.model.config
        config.architectures = [type(this.model).__name__]
        config.dtype = "bfloat16" if this.options.dtype == "bf16" else "float32"
        config.save_pretrained(aside)
        if this.model.generation_config is not None:
            generation = this.model.generation_config
            if this.choice.directory is None or not this.choice.has_tokenizer:
                generation.bos_token_id = generation.eos_token_id = this.data.end_of_text
            generation.save_pretrained(aside)
        this.engine.save_16bit_model(str(aside))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    except OSError as error:
        raise StorageError(
            f"cannot write the model to {target}: {error.strerror or error}", path=target, errno=error.errno
        ) from None


def _tokenizer(data: Dataset) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(data.tokenizer_folder / "tokenizer.json"))


def _encode(data: Dataset, text: str) -> list[int]:
    ids: list[int] = _tokenizer(data).encode(text, add_special_tokens=False).ids
    if not ids:
        raise DataError("--sample-prompt holds no tokens")
    return ids


def _sample(this: _Run) -> None:
    from zeroxide.cli.training.sample import generate

    options, data = this.options, this.data
    longest = this.choice.longest_sequence
    room = options.sample_tokens if longest is None else min(options.sample_tokens, longest - 1)
    if options.sample_prompt:
        prompt = _encode(data, options.sample_prompt)
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
        stop=lambda: this.stop.requested,
    )
    tokenizer = _tokenizer(data)
    begin, text = tokenizer.decode(prompt), tokenizer.decode(tokens)
    this.reporter.say("sample:")
    for line in (begin + text).splitlines():
        this.reporter.say(f"  | {line}")
    this.reporter.event("sample", step=this.step, prompt=begin, text=text)


def _plot(this: _Run) -> Path | None:
    """Draw the loss curve. A missing or failing matplotlib costs the picture, not the run."""
    command = [sys.executable, "-P", plot.__file__, str(this.folder.log), str(this.folder.plot)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode == 0:
        return this.folder.plot
    reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
    this.reporter.say(f"no loss plot: {reason}")
    return None


def _expected_bytes(plan: Any) -> dict[str, int]:
    expected = getattr(plan, "expected", None)
    return {str(key): int(value) for key, value in expected.items()} if isinstance(expected, dict) else {}

"""What the user asked `zeroxide train` to do: typed, checked, and comparable with an earlier run."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from zeroxide.config.sizes import parse_bytes
from zeroxide.config.state_formats import EXACT, FORMATS
from zeroxide.errors import ConfigError

__all__ = ["FLAGS", "TrainOptions", "conflicts"]

_LARGEST_COUNT = 1 << 40
_LARGEST_SEQUENCE = 1 << 20

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("bf16", "fp16", "fp32")
IO_ENGINES = ("auto", "io_uring", "threads")
EARLY = ("never", "always", "adaptive")


@dataclass(frozen=True)
class TrainOptions:
    """The options of one run, all resolved: no field stands for a default that is decided later."""

    model: str = "gpt2"
    """A preset's name or the path of a Hugging Face model directory."""
    data: tuple[str, ...] = ()
    """Files, folders and globs of text; empty: the running Python's standard library."""
    offload: str = "none"
    """`none`, `cpu` or `nvme:DIR`."""
    host_memory: str | None = None
    """Budget for the resident memory of the whole process, as `2GiB`; None: no limit."""
    steps: int = 100
    """Optimizer steps in the whole run, those before a resume included."""
    batch_size: int = 8
    """Sequences per micro-batch."""
    seq_len: int = 128
    """Tokens per sequence."""
    lr: float = 1e-4
    """Peak learning rate."""
    bias_lr: float = 3e-2
    """Peak learning rate of biases whose values are drawn; those that are loaded get `lr`."""
    warmup: int | None = None
    """Steps of linear warm-up; None: a third of the run, at most 100."""
    schedule: str = "cosine"
    """What the learning rate does after warm-up: `cosine` or `linear` decay, or `constant`."""
    weight_decay: float = 0.1
    """Decoupled decay of every weight with two or more dimensions; the others are never decayed."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""
    accumulate: int = 1
    """Micro-batches per step."""
    dtype: str = "bf16"
    """What forward and backward compute in: `bf16`, `fp16` with a dynamic loss scale, or `fp32`."""
    seed: int = 0
    """Determines initial weights, data order and dropout."""
    eval_every: int = 0
    """Held-out loss every so many steps; 0: only at the end."""
    eval_batches: int = 16
    """Batches in one held-out loss; the same ones every time."""
    save_every: int = 0
    """Checkpoint every so many steps and at the end; 0: only when interrupted."""
    durable_every: int = 0
    """Commit all state where it is on disk every so many steps, to go on from when the process is killed; 0: never."""
    out: str | None = None
    """The run folder; None: `runs/<model>`, with a number appended where that is taken."""
    sample_prompt: str | None = None
    """Text to go on from at the end; None: the beginning of the held-out text."""
    sample_tokens: int = 48
    """Tokens to generate at the end; 0: no sample."""
    threads: int = 0
    """Threads for compute; 0: as many as the process may run on."""
    format: str | None = None
    """Optimizer state format, `split`, `fp32`, `split-bf16` or `compact`; None: `split` with bf16, else `fp32`."""
    activation_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them."""
    recompute: str = "none"
    """Blocks that compute their activations again: `none`, `all`, how many of the first, or `auto`: as few as
    `host_memory` takes."""
    activation_path: str | None = None
    """Directory for activations that wait for backward; with `host_memory`, for those that it has no room for."""
    loss_chunk: int = 0
    """Columns of the vocabulary whose logits are there at a time; 0: all."""
    row_bytes: str | None = None
    """Largest block of rows of embedding and output projection; None: they stay in one piece."""
    update_in_backward: str = "never"
    """Backward updates each unit as soon as its gradients are complete: `never`, `always`, or `adaptive`, while that
    takes fewer bytes on disk."""
    io_engine: str = "auto"
    """`auto`, `io_uring` or `threads`."""
    trace: str | None = None
    """Steps whose timeline is recorded, `FIRST:LAST`, or `none`; None: the newest two, whenever the run ends."""

    def checked(self, ranks_here: int = 1) -> TrainOptions:
        """Return the same options, defaults resolved. Raises `ConfigError` for the first that makes no sense.

        So many ranks of this host share its processors.
        """
        _count("steps", self.steps, 1)
        _count("batch_size", self.batch_size, 1)
        _count("seq_len", self.seq_len, 2, _LARGEST_SEQUENCE)
        _count("accumulate", self.accumulate, 1)
        for name in ("eval_every", "save_every", "durable_every", "sample_tokens"):
            _count(name, getattr(self, name), 0)
        _count("eval_batches", self.eval_batches, 1)
        _count("threads", self.threads, 0, 4096)
        _count("loss_chunk", self.loss_chunk, 0)
        _count("seed", self.seed, 0, 2**63 - 1)
        for name in ("lr", "bias_lr"):
            _number(name, getattr(self, name), least=0.0, most=100.0, above=True)
        _number("weight_decay", self.weight_decay, least=0.0, most=100.0)
        _number("clip", self.clip, least=0.0, most=1e12)
        for name, choices in (
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("io_engine", IO_ENGINES),
            ("update_in_backward", EARLY),
        ):
            _choice(name, getattr(self, name), choices)
        if self.format is not None:
            _choice("format", self.format, FORMATS)
        state_format = self.format or ("split" if self.dtype == "bf16" else "fp32")
        if state_format != "fp32" and self.dtype != "bf16":
            raise ConfigError(f"--format {state_format} needs --dtype bf16, got {self.dtype}", path="format")
        # Adam's first updates move every weight by the full rate, however small its gradient, and those of rarely seen
        # tokens all the same way. A short run has little else than first updates.
        warmup = min(100, self.steps // 3) if self.warmup is None else self.warmup
        _count("warmup", warmup, 0)
        if self.schedule != "constant" and warmup >= self.steps and self.steps > 1:
            raise ConfigError(
                f"--warmup {warmup} leaves no step for the {self.schedule} decay: give fewer than --steps {self.steps}",
                path="warmup",
            )
        self._check_offload()
        if self.durable_every and not self.offload.startswith("nvme:"):
            raise ConfigError(
                f"--durable-every {self.durable_every} needs a disk: give --offload nvme:DIR, not {self.offload}",
                path="durable_every",
                expected="--offload nvme:DIR",
                got=self.offload,
            )
        self._check_size("host_memory", self.host_memory, 1 << 20, "1 MiB")
        self._check_size("row_bytes", self.row_bytes, 1, "1 byte")
        self._check_recompute()
        self._check_trace()
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)
        return dataclasses.replace(self, warmup=warmup, format=state_format, threads=threads)

    def _check_offload(self) -> None:
        kind, separator, directory = self.offload.partition(":")
        if kind == "nvme" and directory:
            if os.path.exists(directory) and not os.path.isdir(directory):
                raise ConfigError(
                    f"--offload {self.offload}: {directory} is a file, a folder is needed", path="offload"
                )
            return
        if kind not in ("none", "cpu") or separator:
            raise ConfigError(
                f"--offload must be none, cpu or nvme:DIR, got {self.offload!r}",
                path="offload",
                expected="none, cpu or nvme:DIR",
                got=self.offload,
            )

    @staticmethod
    def _check_size(name: str, given: str | None, least: int, said: str) -> None:
        if given is None:
            return
        flag = FLAGS[name]
        try:
            size = parse_bytes(int(given) if given.isdecimal() else given)
        except ValueError as error:
            raise ConfigError(f"{flag}: expected {error}, got {given!r}", path=name) from None
        if not least <= size < 1 << 60:
            raise ConfigError(f"{flag} {given} is not a usable size: give {said} to 1 EiB", path=name)

    def _check_recompute(self) -> None:
        asked = self.recompute
        problem = None
        if asked not in ("none", "all", "auto") and not re.fullmatch(r"\d{1,9}", asked):
            problem = "must be none, all, auto or a number of blocks"
        elif asked not in ("none", "0") and self.activation_checkpointing:
            problem = "and --activation-checkpointing would compute activations a third time: give one of them"
        elif asked == "auto" and self.host_memory is None:
            problem = "needs --host-memory, the budget that says how many blocks have no room"
        elif asked == "auto" and self.activation_path is not None:
            problem = "and --activation-path both choose what stays in memory: give a number of blocks beside that"
        if problem is not None:
            raise ConfigError(f"--recompute {asked} {problem}", path="recompute", got=asked)

    def _check_trace(self) -> None:
        if self.trace is None or self.trace == "none":
            return
        match = re.fullmatch(r"(\d{1,13}):(\d{1,13})", self.trace)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            expected = "FIRST:LAST, two steps of the run counted from 1, or none"
            raise ConfigError(
                f"--trace: expected {expected}, got {self.trace!r}", path="trace", expected=expected, got=self.trace
            )
        if int(match[1]) > self.steps:
            raise ConfigError(
                f"--trace {self.trace} begins after the last step, --steps {self.steps}", path="trace", got=self.trace
            )

    @property
    def traced_steps(self) -> tuple[int, int] | None:
        """First and last step that `trace` names; None where it names none."""
        first, separator, last = (self.trace or "").partition(":")
        return (int(first), int(last)) if separator else None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.batch_size * self.seq_len * self.accumulate

    def as_json(self) -> dict[str, Any]:
        """Return the options as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainOptions:
        """Rebuild options that `as_json` wrote. Raises `ConfigError` for a key or a type that is not ours."""
        hints = get_type_hints(cls)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            near = difflib.get_close_matches(unknown[0], hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown option {unknown[0]!r} in the run's record{hint}", path=unknown[0])
        given = dict(value)
        if isinstance(given.get("data"), list):
            given["data"] = tuple(str(item) for item in given["data"])
        for name, item in given.items():
            allowed = tuple(get_args(hints[name])) if get_args(hints[name]) and name != "data" else (hints[name],)
            plain = tuple(tuple if name == "data" else kind for kind in allowed)
            if not isinstance(item, (*plain, int) if float in plain else plain):
                raise ConfigError(f"option {name!r} in the run's record has the wrong type: {item!r}", path=name)
        return cls(**given)


FLAGS = {field.name: "--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainOptions)}
"""Field name -> command line flag."""

_DECIDE_THE_NUMBERS = (
    "model",
    "batch_size",
    "seq_len",
    "lr",
    "bias_lr",
    "warmup",
    "schedule",
    "weight_decay",
    "clip",
    "accumulate",
    "dtype",
    "loss_chunk",
    "row_bytes",
    "seed",
)


def conflicts(recorded: TrainOptions, wanted: TrainOptions) -> list[str]:
    """Return one phrase per option that decides the numbers of a run and differs between the two.

    Where state lives, how much memory it may use and how often the run reports change no number, so they may differ.
    The number of steps matters exactly where the learning rate is derived from it. The corpus is compared by its
    content, elsewhere.
    """
    names = _DECIDE_THE_NUMBERS if recorded.schedule == "constant" else (*_DECIDE_THE_NUMBERS, "steps")
    if recorded.durable_every and not wanted.durable_every:
        # Steps since the newest checkpoint would be lost without a word.
        names = (*names, "durable_every")
    lossy = {recorded.format, wanted.format}.difference(EXACT, {None})
    if lossy:
        names = (*names, "format")
    return [
        f"{FLAGS[name]} (run: {getattr(recorded, name)}, now: {getattr(wanted, name)})"
        for name in names
        if getattr(recorded, name) != getattr(wanted, name)
    ]


def _count(name: str, value: int, least: int, most: int = _LARGEST_COUNT) -> None:
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise ConfigError(f"{FLAGS[name]} must be {bound}, got {value}", path=name, expected=bound, got=str(value))


def _number(name: str, value: float, *, least: float, most: float, above: bool = False) -> None:
    inside = math.isfinite(value) and value <= most and (value > least if above else value >= least)
    if not inside:
        bound = f"a number {'above' if above else 'from'} {least:g} to {most:g}"
        raise ConfigError(f"{FLAGS[name]} must be {bound}, got {value:g}", path=name, expected=bound, got=str(value))


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{FLAGS[name]} must be one of {', '.join(choices)}, got {value!r}{hint}",
            path=name,
            expected=", ".join(choices),
            got=value,
        )

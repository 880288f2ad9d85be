"""Whether a job can run with a config: its keys, the batch on so many ranks, and the plan for a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from zeroxide.config import Config
from zeroxide.config.explain import left_auto
from zeroxide.config.resolve import examine
from zeroxide.config.source import Source, read
from zeroxide.errors import BudgetError, ConfigError, ModelError, ZeroxideError

__all__ = ["Checked", "Problem", "check"]

_MISSING = "No such file or directory"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: in which file and line, which key, and in words that say what to do."""

    where: str
    key: str | None
    expected: str | None
    got: str | None
    what: str
    line: int | None = None


@dataclass
class Checked:
    """What was found."""

    problems: list[Problem] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    """The batch on the ranks, and the plan, in lines for people."""
    notes: list[str] = field(default_factory=list)
    """What may be as it should, and should be looked at."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check(file: str, model: str | None, world: int, ranks_per_host: int) -> Checked:
    """Everything that can be known of a run with the config in `file` before it is started.

    Raises ConfigError where there is no such file.
    """
    found = Checked()
    try:
        source = read(file)
    except ConfigError as error:
        if _MISSING in error.message:
            raise
        found.problems.append(Problem(file, None, None, None, error.message))
        return found
    config, errors = examine(source.data, world_size=world, origin=file)
    found.problems += [_problem(each, source) for each in errors]
    _auto(source, found)
    if config is None:
        return found
    _batch(config, world, found)
    if model is not None:
        _plan(config, source, model, world, ranks_per_host, found)
    return found


def _problem(error: ZeroxideError, source: Source) -> Problem:
    path = error.path if isinstance(error, ConfigError) else None
    what = error.message.removeprefix(f"{source.origin}: ")
    if not isinstance(error, ConfigError) or path is None:
        return Problem(source.origin, path, None, None, what)
    return Problem(source.where(path), path, error.expected, error.got, what, source.line(path))


def _auto(source: Source, found: Checked) -> None:
    left = left_auto(source)
    if left:
        listed = ", ".join(f"{key} (line {source.line(key)})" for key in left)
        found.notes.append(
            f'"auto" is for Hugging Face\'s Trainer and Accelerate to fill in; without them these have their defaults: '
            f"{listed}"
        )


def _batch(config: Config, world: int, found: Checked) -> None:
    batch = config.batch
    ranks = f"{world} rank" + ("" if world == 1 else "s")
    if batch.train_batch_size is None:
        found.facts.append(
            f"batch: no size is given; {batch.gradient_accumulation_steps} micro-batches a step on {ranks}"
        )
        return
    found.facts.append(
        f"batch: {batch.train_batch_size} samples a step = {batch.train_micro_batch_size_per_gpu} a micro-batch * "
        f"{batch.gradient_accumulation_steps} micro-batches * {ranks}"
    )


def _plan(config: Config, source: Source, model: str, world: int, ranks_per_host: int, found: Checked) -> None:
    """Plans the model's memory; one note where transformers is not there to tell its shapes."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        found.notes.append("--model: not looked at, since transformers is not installed; pip install transformers")
        return
    from zeroxide.cli.configs.fit import fit

    try:
        facts, notes, problems = fit(config, model, world, ranks_per_host)
    except (BudgetError, ConfigError, ModelError) as error:
        found.problems.append(_problem(error, source))
        return
    found.facts += facts
    found.notes += notes
    found.problems += [Problem(source.where(key), key, None, None, text, source.line(key)) for key, text in problems]

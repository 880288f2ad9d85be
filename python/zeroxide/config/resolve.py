"""From what the user wrote to what zeroxide reads: the document and the shortcuts, section by section.

Every section is resolved by itself, so that what is wrong with one does not hide what is wrong with another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zeroxide.config.check import Path, Problem, inspect, refusal, validate
from zeroxide.config.document import Document
from zeroxide.config.fields import Section
from zeroxide.config.given import Given
from zeroxide.config.resolved import Config
from zeroxide.config.sections import (
    activation_checkpointing,
    activations,
    aio,
    batch,
    checkpoint,
    comms_logger,
    expert_parallel,
    flops_profiler,
    gradients,
    mesh,
    monitor,
    optimizer,
    pipeline,
    precision,
    report,
    scheduler,
    tensor_parallel,
    zero,
    zeroxide,
)
from zeroxide.config.sections.precision import Dtype
from zeroxide.config.sections.sequence import SequenceKeys, shared
from zeroxide.config.shortcuts import Shortcuts
from zeroxide.errors import ConfigError

__all__ = ["examine", "resolve"]

T = TypeVar("T")


def resolve(
    data: Mapping[str, Any],
    keywords: Mapping[str, Any],
    *,
    world_size: int,
    origin: str,
    own_dtype: Callable[[], Dtype] | None = None,
    stages: int | None = None,
    sequence: int | None = None,
) -> Config:
    """Return the config that `data` (a parsed document) and `keywords` (shortcuts) come to on `world_size` processes.

    `own_dtype`, `stages` and `sequence` are as for `load`. Raises `ConfigError`.
    """
    no_effect: list[tuple[str, str]] = []
    document = validate(Document, data, origin=origin, no_effect=no_effect)
    shortcuts = validate(Shortcuts, keywords, origin="keyword arguments", no_effect=[])
    given = Given(shortcuts, origin, Document, world_size, stages, no_effect, sequence)
    return _Sections(given).resolve(document, data, own_dtype)


def examine(data: Mapping[str, Any], *, world_size: int, origin: str) -> tuple[Config | None, list[ConfigError]]:
    """As `resolve` without keywords, with all that is wrong, one error for each key; None if anything is.

    A section with a wrong key is not resolved, since what else it comes to would be a guess.
    """
    no_effect: list[tuple[str, str]] = []
    document, problems = inspect(Document, data, no_effect=no_effect)
    rest: Mapping[str, Any] = data
    while document is None:
        rest = _without(rest, problems)
        document, more = inspect(Document, rest, no_effect=no_effect)
        problems += [each for each in more if each.path not in {known.path for known in problems}]
    errors = list(refusal(problems, origin).found) if problems else []
    wrong = {each.path[0] for each in problems}
    given = Given(validate(Shortcuts, {}, no_effect=[]), origin, Document, world_size, no_effect=no_effect)
    sections = _Sections(given, wrong)
    config = sections.resolve(document, data, None)
    errors += [each for error in sections.errors for each in error.found]
    return (None if errors else config), errors


def _without(data: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """A copy of `data` without the keys that are wrong; where one is missing, without the section that needs it."""
    rest = dict(data)
    for each in problems:
        _drop(rest, each.path)
    return rest


def _drop(section: dict[str, Any], path: Path) -> None:
    first, *inner = path
    # Keys that are no strings are named by what they print as.
    name = next((key for key in section if str(key) == first), None)
    if name is None:
        return
    below = section[name]
    if inner and isinstance(below, Mapping) and inner[0] in below:
        section[name] = dict(below)
        _drop(section[name], tuple(inner))
    else:
        del section[name]


class _Sections:
    """Resolves the sections of a document. The first error is raised; told what is `wrong` already, all are kept."""

    def __init__(self, given: Given, wrong: set[str] | None = None) -> None:
        self.given = given
        self.errors: list[ConfigError] = []
        self._wrong = wrong
        """Keys at the top of the document with something wrong in them."""

    def resolve(self, document: Document, data: Mapping[str, Any], own_dtype: Callable[[], Dtype] | None) -> Config:
        """What the document comes to, with defaults for sections that have errors."""
        given, zero_section = self.given, document.zero_optimization
        own = document.zeroxide or zeroxide.ZeroxideSection()
        named = (*SequenceKeys.model_fields, "zeroxide")
        axes = self._one(lambda: own.mesh, ("pipeline",), pipeline.with_stages, document.pipeline, own.mesh, given)
        staged = axes
        axes = self._one(
            lambda: staged, ("tensor_parallel",), tensor_parallel.with_tensor_ranks, document.tensor_parallel, staged
        )
        in_parts = axes
        axes = self._one(lambda: in_parts, named, shared, in_parts, document, given)
        clipping = self._one(gradients.Gradients, gradients.GradientKeys, gradients.resolve, document, given)
        sharding = self._one(zero.Zero, ("zero_optimization",), zero.resolve, zero_section, clipping, given)
        dtypes = (*precision.PrecisionKeys.model_fields, "zeroxide")
        return Config(
            precision=self._one(
                precision.Precision,
                dtypes,
                precision.resolve,
                document,
                own.format,
                own.rounding_seed,
                own_dtype,
                given,
            ),
            batch=self._one(batch.Batch, batch.BatchKeys, self._batch, document, axes),
            gradients=clipping,
            zero=sharding,
            mesh=self._one(
                None, ("zero_optimization", "zeroxide"), mesh.resolve, axes, zero_section, sharding.stage, given
            ),
            pipeline=self._one(None, ("pipeline",), pipeline.resolve, document.pipeline, axes, given),
            optimizer=self._one(None, ("optimizer",), optimizer.resolve, document.optimizer, given),
            scheduler=self._one(None, ("scheduler",), scheduler.resolve, document.scheduler, given),
            tensor_parallel=self._one(
                tensor_parallel.TensorParallel,
                ("tensor_parallel", "zeroxide"),
                tensor_parallel.resolve,
                document.tensor_parallel,
                axes,
                given,
            ),
            aio=aio.resolve(document.aio),
            activation_checkpointing=activation_checkpointing.resolve(document.activation_checkpointing),
            activations=self._one(
                activations.Activations,
                ("zeroxide", "zero_optimization", "activation_checkpointing"),
                activations.resolve,
                own,
                document.activation_checkpointing and document.activation_checkpointing.cpu_checkpointing,
                sharding,
                given,
            ),
            zeroxide=self._one(zeroxide.Zeroxide, ("zeroxide",), zeroxide.resolve, own, given),
            checkpoint=self._one(
                checkpoint.Checkpoint, ("checkpoint", "zeroxide"), checkpoint.resolve, document.checkpoint, own
            ),
            report=report.resolve(document),
            monitor=monitor.resolve(document, given),
            comms_logger=comms_logger.resolve(document.comms_logger, given),
            expert_parallel=self._one(
                expert_parallel.ExpertParallel, ("expert_parallel",), expert_parallel.resolve, document.expert_parallel
            ),
            flops_profiler=flops_profiler.resolve(document.flops_profiler, given),
            no_effect=given.no_effect,
            source=dict(data),
        )

    def _batch(self, document: Document, section: mesh.MeshSection | None) -> batch.Batch:
        return batch.resolve(document, self.given, mesh.batch_ranks(section, self.given))

    def _one(
        self,
        otherwise: Callable[[], T] | None,
        keys: tuple[str, ...] | type[Section],
        resolve: Callable[..., Any],
        *arguments: Any,
    ) -> Any:
        """What `resolve` makes of its section; `otherwise` where that fails, or where one of its `keys` is wrong."""
        if self._wrong is None:
            return resolve(*arguments)
        names = keys if isinstance(keys, tuple) else tuple(keys.model_fields)
        if not self._wrong.intersection(names):
            try:
                return resolve(*arguments)
            except ConfigError as error:
                self.errors.append(error)
                # What looks at this section beside its own would take its defaults for what was asked.
                self._wrong.update(names if len(names) == 1 else ())
        return None if otherwise is None else otherwise()

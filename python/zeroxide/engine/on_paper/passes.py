"""What one micro-batch takes in each stage of a rank: rehearsed from shapes, by the model's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroxide.device.placement import HOST
from zeroxide.engine.on_paper.part import Carried, PaperPart
from zeroxide.engine.on_paper.stand_ins import Counted
from zeroxide.errors import ModelError, ZeroxideError
from zeroxide.profiling.rehearsal import rehearse

__all__ = ["Given", "StagePass", "rehearse_part"]


@dataclass(frozen=True)
class Given:
    """What one stage gives the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of it, and of its gradient."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StagePass:
    """A micro-batch, forward and backward, in one stage."""

    kept: int
    """Bytes of activations from its forward to its backward."""
    peak: int
    """Most bytes beside weights and kept gradients at any time, these among them."""
    flops: tuple[int, int]
    """Of forward and backward."""
    gives: Given | None
    """None of the last stage."""
    reduced: Counted = field(default_factory=Counted)
    """Sums over tensor-parallel ranks."""
    gathered: Counted = field(default_factory=Counted)
    """What they put together."""
    carried: Carried = field(default_factory=Carried)
    """To experts and over sequences."""


def rehearse_part(
    part: PaperPart, batch: int, tokens: int, received: Given | None, prepare: Callable[[Any], None]
) -> dict[int, StagePass]:
    """What each stage of `part` takes of a micro-batch of `batch` sequences, of which this rank has `tokens` each.

    received: what a stage is given by the one before, known from an earlier part; None where this one has the first.
    prepare: what is done to the model before, as making it compute activations again. The part is of no use
    afterwards. Raises ModelError for a model that does what shapes alone cannot answer.
    """
    model: Any = part.module
    prepare(model)
    model.train()
    found: dict[int, StagePass] = {}
    for stage in part.own_stages:
        try:
            found[stage] = _stage_pass(part, stage, _batch(part, batch, tokens), received)
        except ZeroxideError:
            raise
        # The model's own code runs, and may ask anything of its tensors.
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ModelError(f"{type(model).__name__} cannot be rehearsed without values: {line[:200]}") from error
        received = found[stage].gives or received
    return found


def _batch(part: PaperPart, batch: int, tokens: int) -> dict[str, Any]:
    ids = torch.zeros((batch, tokens), dtype=torch.int64, device=HOST)
    more = {} if part.axes.sp == 1 else {"position_ids": torch.arange(tokens, device=HOST).expand(batch, -1)}
    return {"input_ids": ids, "labels": ids, "use_cache": False, **more}


def _stage_pass(part: PaperPart, stage: int, batch: dict[str, Any], received: Given | None) -> StagePass:
    model: Any = part.module
    gives: list[Given] = []
    last = part.stages is None or stage == part.stages.total_stages - 1

    def run() -> torch.Tensor:
        if part.stages is None:
            result: torch.Tensor = model(**batch).loss
            return result
        given = None
        if stage:
            assert received is not None, "an earlier stage gives it"
            like = next(model.parameters())
            given = like.detach().new_empty(received.shape, dtype=received.dtype).requires_grad_()
        args, kwargs = part.stages.arguments(stage, given, batch)
        found = model(*args, **kwargs)
        if last:
            loss: torch.Tensor = part.stages.loss_of(found, batch)
            return loss
        gives.append(Given(tuple(found.shape), found.dtype))
        hidden: torch.Tensor = found
        return hidden

    group = part.group
    rehearsed = rehearse(model, run)
    return StagePass(
        rehearsed.kept,
        rehearsed.peak,
        (rehearsed.forward.flops, rehearsed.backward.flops),
        gives[0] if gives else None,
        Counted() if group is None else group.reduced.taken(),
        Counted() if group is None else group.gathered.taken(),
        part.carried.taken(),
    )

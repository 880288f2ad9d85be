"""What the parts of a run share once everything is prepared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zeroxide.cli.planning.measured import Planned
from zeroxide.cli.training.batches import HeldOutBatches, TrainingBatches
from zeroxide.cli.training.dataset import Dataset
from zeroxide.cli.training.models import ModelChoice
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.report import Reporter
from zeroxide.cli.training.run_folder import RunFolder
from zeroxide.cli.training.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Running"]


@dataclass
class Running:
    """A run between preparation and end: `step` steps are done, the newest checkpoint is of `saved_step` (-1: none)."""

    options: TrainOptions
    folder: RunFolder
    reporter: Reporter
    together: Together
    choice: ModelChoice
    data: Dataset
    engine: Any
    model: PreTrainedModel
    num_parameters: int
    batches: TrainingBatches
    held_out: HeldOutBatches
    step: int = 0
    saved_step: int = -1
    loaded: bool = False
    """A checkpoint was loaded."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """`engine.memory()` of the process: when training was about to begin, and after the first forward."""
    traffic: list[tuple[int, int]] = field(default_factory=list)
    """Bytes read and written in each step."""
    phases: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each step: forward and update, and backward."""
    planned: Planned | None = None
    """What `zeroxide plan` expected of such a run; None where it was not asked on this machine."""
    expected_process: int | None = None
    """Most resident bytes of the process that training should reach; known after the first backward."""

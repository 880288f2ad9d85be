"""The config file: DeepSpeed's JSON plus the section `zeroxide`. Each file of `sections` has the keys of one section.

A field without a mark has an effect and ends up in `zeroxide.config.Config`. `NoEffect` and `NotBuilt` say why another
one has none. Types that only unbuilt or ineffective keys need are left open on purpose.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from zeroxide.config.fields import Flag, NoEffect
from zeroxide.config.sections.activation_checkpointing import ActivationCheckpointingSection
from zeroxide.config.sections.aio import AioSection
from zeroxide.config.sections.batch import BatchKeys
from zeroxide.config.sections.checkpoint import CheckpointSection
from zeroxide.config.sections.comms_logger import CommsLoggerSection
from zeroxide.config.sections.expert_parallel import ExpertParallelSection
from zeroxide.config.sections.flops_profiler import FlopsProfilerSection
from zeroxide.config.sections.gradients import GradientKeys
from zeroxide.config.sections.monitor import MonitorKeys
from zeroxide.config.sections.optimizer import OptimizerSection
from zeroxide.config.sections.pipeline import PipelineSection
from zeroxide.config.sections.precision import PrecisionKeys
from zeroxide.config.sections.report import ReportKeys
from zeroxide.config.sections.scheduler import SchedulerSection
from zeroxide.config.sections.sequence import SequenceKeys
from zeroxide.config.sections.tensor_parallel import TensorParallelSection
from zeroxide.config.sections.unbuilt import UnbuiltKeys
from zeroxide.config.sections.zero import ZeroSection, stage_of_switch
from zeroxide.config.sections.zeroxide import ZeroxideSection

__all__ = ["Document"]


# The keys of the last base come first.
class Document(UnbuiltKeys, MonitorKeys, PrecisionKeys, ReportKeys, GradientKeys, SequenceKeys, BatchKeys):
    """The whole config."""

    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None
    zero_optimization: Annotated[ZeroSection | None, BeforeValidator(stage_of_switch)] = None
    aio: AioSection | None = None
    activation_checkpointing: ActivationCheckpointingSection | None = None
    checkpoint: CheckpointSection | None = None
    pipeline: PipelineSection | None = None
    comms_logger: CommsLoggerSection | None = None
    expert_parallel: ExpertParallelSection | None = None
    tensor_parallel: TensorParallelSection | None = None
    flops_profiler: FlopsProfilerSection | None = None
    zeroxide: ZeroxideSection | None = None

    zero_allow_untested_optimizer: Annotated[Flag | None, NoEffect("an optimizer works or is refused by name")] = None
    zero_force_ds_cpu_optimizer: Annotated[Flag | None, NoEffect("offloaded state always has its own kernel")] = None
    vocabulary_size: Annotated[Any, NoEffect("it only feeds a warning in DeepSpeed")] = None

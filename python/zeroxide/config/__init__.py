"""The config: DeepSpeed's JSON, keyword shortcuts, and what they come to.

This package is the only place that parses user input. `load` returns a `Config`, which the rest of zeroxide reads:

>>> load({"bf16": {"enabled": True}}, lr=1e-4, offload="nvme:/mnt/fast", host_memory="8GiB").precision.format
'split'

It imports neither torch nor the extension module, and pydantic only once `load` or a class of the config is used.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zeroxide.config.sizes import format_bytes, parse_bytes
from zeroxide.config.source import read
from zeroxide.config.state_formats import EXACT, FORMATS

if TYPE_CHECKING:
    from zeroxide.config.resolved import Config
    from zeroxide.config.rules import RULES, SGD, Adagrad, Lion, Optimizer, Rule
    from zeroxide.config.sections.activations import Activations
    from zeroxide.config.sections.comms_logger import CommsLogging
    from zeroxide.config.sections.expert_parallel import ExpertParallel
    from zeroxide.config.sections.flops_profiler import FlopsProfile
    from zeroxide.config.sections.mesh import Mesh
    from zeroxide.config.sections.monitor import LogFolder, Monitors, WandbRun
    from zeroxide.config.sections.precision import Dtype, LossScale, LowDtype, Precision
    from zeroxide.config.sections.scheduler import Scheduler
    from zeroxide.config.sections.tensor_parallel import TensorParallel, TPLayerSpec
    from zeroxide.config.sections.zero import ErrorFeedback, Offload

__all__ = [
    "EXACT",
    "FORMATS",
    "RULES",
    "SGD",
    "Activations",
    "Adagrad",
    "CommsLogging",
    "Config",
    "Dtype",
    "ErrorFeedback",
    "ExpertParallel",
    "FlopsProfile",
    "Lion",
    "LogFolder",
    "LossScale",
    "LowDtype",
    "Mesh",
    "Monitors",
    "Offload",
    "Optimizer",
    "Precision",
    "Rule",
    "Scheduler",
    "TPLayerSpec",
    "TensorParallel",
    "WandbRun",
    "format_bytes",
    "load",
    "parse_bytes",
]

_HOMES = {
    "Activations": "sections.activations",
    "Adagrad": "rules",
    "CommsLogging": "sections.comms_logger",
    "Config": "resolved",
    "Dtype": "sections.precision",
    "ExpertParallel": "sections.expert_parallel",
    "FlopsProfile": "sections.flops_profiler",
    "Lion": "rules",
    "LogFolder": "sections.monitor",
    "LossScale": "sections.precision",
    "LowDtype": "sections.precision",
    "ErrorFeedback": "sections.zero",
    "Mesh": "sections.mesh",
    "Monitors": "sections.monitor",
    "Offload": "sections.zero",
    "Optimizer": "rules",
    "Precision": "sections.precision",
    "RULES": "rules",
    "Rule": "rules",
    "SGD": "rules",
    "Scheduler": "sections.scheduler",
    "TPLayerSpec": "sections.tensor_parallel",
    "TensorParallel": "sections.tensor_parallel",
    "WandbRun": "sections.monitor",
}


def load(
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    world_size: int = 1,
    own_dtype: Callable[[], Dtype] | None = None,
    stages: int | None = None,
    sequence: int | None = None,
    **shortcuts: Any,
) -> Config:
    """Read a config (a mapping, or the path of a JSON file with comments) together with keyword shortcuts.

    `Shortcuts` in `shortcuts.py` lists the shortcuts; one that is None counts as not given.

    `offload` sets the home of parameters and of optimizer state, and `offload_param` and `offload_optimizer` take
    precedence over it: each is `"none"`, `"cpu"` or `"nvme:DIRECTORY"`. `dtype` is `"bf16"`, `"fp16"`, `"fp32"` or
    the torch dtype. Without a precision in the config and without `dtype`, training is in what `own_dtype` returns, the
    dtype of the model's weights, or in fp32. `stages` are the ranks that a `PipelineModule` is cut for,
    `sequence` those that share the sequences of a batch, as an `mpu` says.

    Raises `ConfigError`: for an unknown key or shortcut, a value that does not fit, a key whose meaning is not built
    yet, and a shortcut that contradicts the config.
    """
    from zeroxide.config.resolve import resolve  # pydantic costs a tenth of a second to import

    source = read(config)
    return resolve(
        source.data,
        shortcuts,
        world_size=world_size,
        origin=source.origin,
        own_dtype=own_dtype,
        stages=stages,
        sequence=sequence,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f"zeroxide.config.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'zeroxide.config' has no attribute {name!r}")

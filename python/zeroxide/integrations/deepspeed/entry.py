"""`deepspeed.initialize` and `deepspeed.zero.Init`: zeroxide's, after a process group has been made.

Libraries count on one from then on, also where there is one rank.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from zeroxide.config import load
from zeroxide.distributed import init_distributed
from zeroxide.engine.entry import initialize as initialize_engine
from zeroxide.engine.sequences import sequence_size
from zeroxide.integrations.deepspeed.comm import get_world_size
from zeroxide.integrations.deepspeed.logging import logger
from zeroxide.integrations.ownership import Ownership, owner_of
from zeroxide.precision.policy import own_dtype
from zeroxide.zero import Init as ZeroInit

__all__ = ["Init", "initialize"]


@functools.wraps(initialize_engine, assigned=("__module__", "__name__", "__qualname__"))
def initialize(*args: Any, **kwargs: Any) -> Any:
    """See `zeroxide.initialize`. Makes torch's default process group where there is none, also for one rank.

    Keys of a config dict that have a section and a key in one name are left out, as DeepSpeed does not read them. A
    model that such an engine has is taken over from it with its exact weights: that engine ends, and every rank has
    memory for the whole model meanwhile. At stage 3 over several ranks `module.state_dict()` has names and shapes
    alone, and no rank waits for another.
    """
    init_distributed(distributed_port=kwargs.get("distributed_port", 29500), verbose=False)
    asked = inspect.signature(initialize_engine).bind(*args, **kwargs)
    for name in ("config", "config_params"):
        if isinstance(asked.arguments.get(name), dict):
            asked.arguments[name] = _without_dotted(asked.arguments[name])
    model = asked.arguments.get("model")
    if not isinstance(model, nn.Module):
        return initialize_engine(*asked.args, **asked.kwargs)
    before = owner_of(model)
    if before is not None:
        # What is wrong with the config is said while the model still has its engine.
        given = asked.arguments.get("config") or asked.arguments.get("config_params")
        shared = sequence_size(asked.arguments.get("mpu"), asked.arguments.get("mesh_param"))
        own = functools.partial(own_dtype, model)
        load(given, world_size=get_world_size(), own_dtype=own, sequence=shared)
        logger.info("the engine that has the model ends: another one takes it over")
        before.give_back()
    owner = Ownership.of(model, trains=True)
    made = initialize_engine(*asked.args, **asked.kwargs)
    # Accelerate's own way to save has every rank but the first ask its module for a dict that nobody looks into.
    made[0].parts.state_dicts.names_alone = True
    owner.belongs_to(model, made[0])
    return made


def _without_dotted(config: dict[str, Any]) -> dict[str, Any]:
    # TRL 1.16.0 (models/utils.py, prepare_deepspeed) writes "zero_optimization.reduce_bucket_size" and the like.
    dotted = sorted(key for key in map(str, config) if "." in key and key.partition(".")[0] in config)
    for key in dotted:
        section, _, name = key.partition(".")
        logger.warning(
            "config key %r has no effect, as with DeepSpeed: %r would have to stand in %r", key, name, section
        )
    return {key: value for key, value in config.items() if key not in dotted}


class Init(ZeroInit):
    """See `zeroxide.zero.Init`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init_distributed(verbose=False)
        super().__init__(*args, **kwargs)

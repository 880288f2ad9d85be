"""What a strategy is asked for, and the config of an engine that it comes to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zeroxide.config import load
from zeroxide.errors import ConfigError

__all__ = ["DTYPES", "NAMES", "NVME_PATH", "Settings", "dtype_of", "refused"]

NVME_PATH = "ZEROXIDE_NVME_PATH"
"""The variable that names the directory for strategies with "nvme" in their names, which cannot say it themselves."""

NAMES: Mapping[str, dict[str, Any]] = {
    "zeroxide": {"stage": 3, "offload": "none"},
    **{f"zeroxide_stage_{stage}": {"stage": stage, "offload": "none"} for stage in (1, 2, 3)},
    **{f"zeroxide_stage_{stage}_offload": {"stage": stage, "offload": "cpu"} for stage in (1, 2, 3)},
    **{f"zeroxide_stage_{stage}_nvme": {"stage": stage, "offload": "nvme"} for stage in (1, 2, 3)},
}
"""Names for `Trainer(strategy=...)` and `Fabric(strategy=...)`, with what each asks for."""

DTYPES: Mapping[str, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
}
"""Lightning's precisions that an engine computes in. Weights are exact in all: "true" rounds those of the beginning."""

_SECTIONS = ("bf16", "bfloat16", "fp16", "torch_autocast")


def dtype_of(precision: str) -> torch.dtype:
    """What the engine computes in. Raises ConfigError for precisions that it does not have."""
    if precision not in DTYPES:
        raise refused(f"precision={precision!r}", f"expected one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def refused(what: str, why: str) -> ConfigError:
    """The error for an option of Lightning's that does not go with an engine."""
    return ConfigError(f"{what} does not go with zeroxide's strategy: {why}", path=what.partition("=")[0])


class Settings:
    """The arguments of a strategy.

    stage: ZeRO stage, 3 unless `config` is given.
    offload: "none", "cpu", "nvme" or "nvme:DIR" for optimizer state, and at stage 3 for weights as well.
    nvme_path: the directory for "nvme".
    host_memory: most resident memory of each process, in bytes or as "2GiB".
    config: a DeepSpeed config as a dict or a path, which then says stage and offload itself.

    Raises ConfigError where they contradict one another, or the config is none.
    """

    def __init__(
        self,
        stage: int | None = None,
        offload: str | None = None,
        nvme_path: str | Path | None = None,
        host_memory: int | str | None = None,
        config: dict[str, Any] | str | Path | None = None,
    ) -> None:
        self.host_memory = host_memory
        self.given: dict[str, Any] = {}
        if config is not None:
            asked = {"stage": stage, "offload": offload, "nvme_path": nvme_path}
            both = [name for name, value in asked.items() if value is not None]
            if both:
                raise ConfigError(f"{both[0]} and config were both given: the config says it", path=both[0])
            # The number of ranks is not known yet, which batch sizes depend on.
            self.given = dict(config) if isinstance(config, dict) else dict(load(config, world_size=1).source)
        else:
            self.given = {"zero_optimization": _zero(3 if stage is None else stage, offload or "none", nvme_path)}
        self.stage = int((self.given.get("zero_optimization") or {}).get("stage", 0))

    @property
    def clipping(self) -> float:
        """The config's norm to which gradients are clipped; 0, as Lightning has it, where it has none."""
        found = self.given.get("gradient_clipping")
        return 0.0 if found in (None, "auto") else float(found)

    @property
    def home(self) -> dict[str, Any]:
        """The part of the config that says where weights are."""
        return {"zero_optimization": self.given.get("zero_optimization") or {}}

    def config_for(self, world_size: int, accumulation: int | None = None) -> dict[str, Any]:
        """The config of an engine, whose every step is Lightning's to call.

        accumulation: Lightning's own number of micro-batches in a step; None where its user counts them. Raises
        ConfigError where the config has another one, or batch sizes that do not go with it.
        """
        name = "gradient_accumulation_steps"
        own = self.given.get(name)
        if accumulation is None and own not in (None, "auto", 1):
            raise refused(f"{name}={own} in the config", "with Fabric, call optimizer.step() where a step is due")
        if accumulation is not None and own not in (None, "auto", accumulation):
            raise refused(
                f"{name}={own} in the config", f"Trainer has accumulate_grad_batches={accumulation}, and that counts"
            )
        plain = {key: value for key, value in self.given.items() if value != "auto"}
        found = load({**plain, name: accumulation or 1}, world_size=world_size).batch
        plain = {key: value for key, value in plain.items() if key not in ("train_batch_size", name)}
        if found.train_micro_batch_size_per_gpu is not None:
            plain["train_micro_batch_size_per_gpu"] = found.train_micro_batch_size_per_gpu
        return {**plain, "gradient_clipping": self.clipping}

    def dtype_for(self, precision: str) -> str | None:
        """The engine's dtype; None leaves it to the config, or to the model. Raises ConfigError."""
        dtype = dtype_of(precision)
        if dtype is torch.float32 or any((self.given.get(each) or {}).get("enabled") for each in _SECTIONS):
            self._check_precision(precision, dtype)
            return None
        return str(dtype)

    def _check_precision(self, precision: str, dtype: torch.dtype) -> None:
        for names, meant in ((("bf16", "bfloat16"), torch.bfloat16), (("fp16",), torch.float16)):
            wanted = any((self.given.get(each) or {}).get("enabled") for each in names)
            if wanted and dtype not in (torch.float32, meant):
                raise refused(f"precision={precision!r}", f"the config has {names[0]} enabled; say one of them")


def _zero(stage: int, offload: str, nvme_path: str | Path | None) -> dict[str, Any]:
    kind, colon, path = offload.partition(":")
    if kind not in ("none", "cpu", "nvme") or (colon and kind != "nvme"):
        raise ConfigError(
            f'offload: expected "none", "cpu", "nvme" or "nvme:DIRECTORY", got {offload!r}', path="offload", got=offload
        )
    found: dict[str, Any] = {"stage": stage}
    if kind == "none":
        return found
    home: dict[str, Any] = {"device": kind}
    if kind == "nvme":
        place = path or nvme_path or os.environ.get(NVME_PATH)
        if not place:
            raise ConfigError(
                f'offload="nvme": in which directory? pass nvme_path or offload="nvme:DIRECTORY", or set {NVME_PATH}',
                path="nvme_path",
            )
        home["nvme_path"] = str(place)
    found["offload_optimizer"] = home
    if stage == 3:
        found["offload_param"] = home
    return found

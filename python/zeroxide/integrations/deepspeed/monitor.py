"""`deepspeed.monitor`: monitors for scripts that have no engine, or write beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroxide.config import Config, Monitors, load
from zeroxide.integrations.deepspeed.comm import get_rank
from zeroxide.monitor import Monitor, open_writers

__all__ = ["MonitorMaster", "get_monitor_config"]

_SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")


def get_monitor_config(param_dict: Mapping[str, Any]) -> Monitors:
    """The monitors that a config, given as a dict, asks for; what else it has is not looked at. Raises ConfigError."""
    return load({key: value for key, value in param_dict.items() if key in _SECTIONS}).monitor


class MonitorMaster(Monitor):
    """Opens the monitors of `monitor_config` on rank 0. Raises ConfigError there for one that cannot be opened."""

    def __init__(self, monitor_config: Monitors) -> None:
        super().__init__(
            open_writers(Config(monitor=monitor_config)) if get_rank() == 0 else (),
            enabled=monitor_config.enabled,
        )
        self.monitor_config = monitor_config

"""Options of a training script's own command line."""

from __future__ import annotations

import argparse

__all__ = ["add_config_arguments"]


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--deepspeed_config FILE`, which `zeroxide.initialize(args=...)` reads, and the flag `--deepspeed`.

    The flag is there for scripts that look at it; `initialize` does not. Returns `parser`.
    """
    group = parser.add_argument_group("zeroxide", "names as with DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for scripts that train with and without it")
    group.add_argument("--deepspeed_config", metavar="FILE", help="config as JSON, read by initialize")
    return parser

"""Blocks of a model whose activations are computed again in backward, and do not wait for it in memory.

A block is an item of one of the model's outermost module lists, as units are made of them, and is counted in the order
of the model. The first ones are recomputed: what the last ones keep, backward asks for first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zeroxide.config import Config
from zeroxide.errors import ConfigError, ModelError
from zeroxide.plan.discover import blocks_in_lists, called_modules

__all__ = ["Recompute", "RecomputedModule", "blocks_to_recompute", "first_blocks", "plan_recompute"]


@dataclass(frozen=True)
class RecomputedModule:
    """A module whose forward runs again in backward: a block, or what is called of it where it is only a container."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Recompute:
    """What of a model is computed again in backward."""

    blocks: int = 0
    """Blocks that the model has; 0 where nothing was asked for."""
    names: tuple[str, ...] = ()
    """Those that are recomputed, in the order of the model."""
    modules: tuple[RecomputedModule, ...] = ()


def blocks_to_recompute(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of `module` that can be recomputed, by name, in the order of the model."""
    return list(blocks_in_lists(module))


def plan_recompute(module: nn.Module, config: Config) -> Recompute:
    """What `zeroxide.recompute` comes to for `module`.

    Raises ConfigError where the model has fewer blocks than are asked for, or none, or has them in a pipeline, and
    ModelError where it recomputes on its own.
    """
    asked = config.activations.recompute
    if asked == 0:
        return Recompute()
    if config.pipeline is not None:
        raise _wrong(
            asked,
            "stages of a pipeline are not built for it: use pipeline.activation_checkpoint_interval or the model's own",
            '"none"',
        )
    blocks = blocks_to_recompute(module)
    if not blocks:
        kind = type(module).__name__
        raise _wrong(asked, f"{kind} has no nn.ModuleList of two blocks or more with parameters", '"none"')
    count = len(blocks) if asked == "all" else asked
    if count > len(blocks):
        each = f"{len(blocks)} blocks, {blocks[0][0]} to {blocks[-1][0]}"
        raise _wrong(asked, f"{type(module).__name__} has {each}", f'"none", "all" or up to {len(blocks)}')
    for name, each in module.named_modules():
        if each.__dict__.get("gradient_checkpointing"):
            raise ModelError(
                f"zeroxide.recompute: {asked} and {name or type(each).__name__} checkpoints its activations itself "
                "(gradient_checkpointing): what is computed again would be computed a third time; call "
                'model.gradient_checkpointing_disable(), or leave recompute "none"',
                name=name,
            )
    return first_blocks(module, count)


def first_blocks(module: nn.Module, count: int) -> Recompute:
    """The first `count` blocks of `module`, which has as many."""
    blocks = blocks_to_recompute(module)
    chosen = blocks[:count]
    modules = [
        RecomputedModule(name if called is block else f"{name} ({type(called).__name__})", called)
        for name, block in chosen
        for called in called_modules(block)
    ]
    distinct = {id(each.module): each for each in modules}
    return Recompute(len(blocks), tuple(name for name, _ in chosen), tuple(distinct.values()))


def _wrong(asked: int | str, problem: str, expected: str) -> ConfigError:
    got = f'"{asked}"' if isinstance(asked, str) else str(asked)
    return ConfigError(
        f"zeroxide.recompute: {got}: {problem}; expected {expected}",
        path="zeroxide.recompute",
        expected=expected,
        got=got,
    )

"""When updates inside of backward must be such that they can be taken back, and why they could not be."""

from __future__ import annotations

from zeroxide.config import Config

__all__ = ["decides_late", "speculation_problem"]


def decides_late(config: Config) -> bool:
    """Whether only all gradients together say what a step must be: it may have to clip, or to be left out."""
    return config.gradients.clipping is not None or config.precision.loss_scale is not None


def speculation_problem(config: Config) -> str | None:
    """Why updates inside of backward could not be taken back; None where they can, or need not be."""
    if not decides_late(config):
        return None
    clipping = config.gradients.clipping
    if clipping is not None:
        default = ", the default," if config.gradients.clipping_is_default else ""
        what, instead = f"gradient_clipping {clipping:g}{default} needs the norm of all gradients", "set it to 0"
    else:
        what, instead = "fp16 leaves a step out if any gradient overflows", "use bf16"
    homes = {"offload_param": config.zero.offload_param.kind, "offload_optimizer": config.zero.offload_optimizer.kind}
    for name, kind in homes.items():
        if kind != "nvme":
            return (
                f"{what}, so that an update before may have to be taken back, which takes a second place on disk: set "
                f'{name}.device to "nvme", got "{kind}", or {instead}'
            )
    if config.zeroxide.durable_every:
        return (
            f"{what}, so that an update before may have to be taken back, and the second place on disk is that of the "
            f"last commit (durable_every {config.zeroxide.durable_every}): set durable_every to 0, or {instead}"
        )
    return None

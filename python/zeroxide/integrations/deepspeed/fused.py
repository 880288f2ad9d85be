"""DeepSpeed's optimizers for the GPU, as descriptions that `initialize` takes over.

An engine makes the step with its own kernels wherever state is. Outside of an engine each is a loop's optimizer of
`zeroxide.optim`, over parameters in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from zeroxide.errors import ConfigError
from zeroxide.optim import DeepSpeedCPUAdam, DeepSpeedCPULion

__all__ = ["FusedAdam", "FusedLion"]


class FusedAdam(DeepSpeedCPUAdam):
    """AdamW, or Adam where `adam_w_mode` is false. Raises ConfigError for `amsgrad`, else as `DeepSpeedCPUAdam`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if not set_grad_none:
            raise ConfigError("FusedAdam: set_grad_none = False is not built: gradients are None after zero_grad")
        super().__init__(
            params,
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            adamw_mode=adam_w_mode,
        )

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> Any:
        """Updates the parameters; see `DeepSpeedCPUAdam`. Raises ConfigError for anything but `closure`, which Apex's
        optimizer of long ago took."""
        others = {"grads": grads, "output_params": output_params, "scale": scale, "grad_norms": grad_norms}
        given = [name for name, value in {**others, "grad_scaler": grad_scaler}.items() if value is not None]
        if given:
            raise ConfigError(f"FusedAdam.step: {given[0]} is not supported: gradients are those of the parameters")
        return super().step(closure)


class FusedLion(DeepSpeedCPULion):
    """Lion."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        if not set_grad_none:
            raise ConfigError("FusedLion: set_grad_none = False is not built: gradients are None after zero_grad")
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

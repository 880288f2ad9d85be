"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zeroxide.config.fields import Betas, Flag, NonNegative
from zeroxide.config.rules.rule import AMSGRAD, FP32_STATES, DeepSpeedClass, Rule
from zeroxide.errors import ConfigError

__all__ = ["Optimizer"]


@dataclass(frozen=True)
class Optimizer(Rule):
    """Adam with decoupled weight decay (AdamW; Loshchilov and Hutter 2019), as torch.optim.AdamW computes it.

    lr: learning rate. betas: decay of the two moments, each in [0, 1). eps: added to the root of the second moment.
    weight_decay: the weight shrinks by `lr * weight_decay`. Where `decoupled` (DeepSpeed's `adamw_mode`) is false,
    `weight_decay * weight` is added to the gradient (Adam; Kingma and Ba 2015). bias_correction: whether moments are
    divided by `1 - beta^step`.
    """

    name: ClassVar[str] = "adam"
    types: ClassVar[tuple[str, ...]] = ("Adam", "AdamW")
    keys: ClassVar[Mapping[str, Any]] = {
        "adam_w_mode": Annotated[Flag | None, Field(description="whether Adam is AdamW, as DeepSpeed has it")],
        "amsgrad": AMSGRAD,
        "fp32_optimizer_states": FP32_STATES,
        "torch_adam": Annotated[
            Flag | None, Field(description="whether weight_decay is torch's where it is not given")
        ],
    }
    keyless: ClassVar[tuple[str, ...]] = ("decoupled",)
    torch: ClassVar[tuple[str, ...]] = ("AdamW", "Adam")
    own: ClassVar[tuple[str, ...]] = ("decoupled", "bias_correction")
    loop_defaults: ClassVar[Mapping[str, Any]] = {"weight_decay": 1e-2}
    deepspeed: ClassVar[DeepSpeedClass | None] = DeepSpeedClass(
        "DeepSpeedCPUAdam",
        {
            "lr": 1e-3,
            "bias_correction": True,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
            "adamw_mode": True,
        },
        {"adamw_mode": "decoupled"},
    )

    lr: NonNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    decoupled: bool = True
    bias_correction: Flag = True

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        mode = {"optimizer.type": "AdamW" if self.decoupled else "Adam", "optimizer.params.adam_w_mode": self.decoupled}
        return super().written() | mode

    @classmethod
    def of_keys(cls, keys: dict[str, Any], kind: str, origin: str) -> dict[str, Any]:
        """As in DeepSpeed, "Adam" is AdamW unless `adam_w_mode` is false; "AdamW" cannot be anything else."""
        decoupled = keys.get("adam_w_mode", True)
        if kind.lower() == "adamw" and not decoupled:
            raise ConfigError(
                f'{origin}: optimizer.params.adam_w_mode = false contradicts optimizer.type = "{kind}"; '
                'use "Adam" for L2 regularisation',
                path="optimizer.params.adam_w_mode",
            )
        # The default of torch.optim.AdamW, which torch_adam asks for; that of torch.optim.Adam is 0.
        of_torch = {"weight_decay": 0.01} if keys.get("torch_adam") and decoupled else {}
        return {**of_torch, **keys, "decoupled": decoupled}

    @classmethod
    def of_torch(cls, kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
        """Adam's objects say themselves whether the weight decay is decoupled, in versions of torch that have that."""
        return {"decoupled": bool(group.get("decoupled_weight_decay", kind == "AdamW")), "bias_correction": True}

    @classmethod
    def saved_by_another(cls, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        """The weight decay of Adam is another than that of AdamW."""
        decoupled = other.get("decoupled", other.get("decoupled_weight_decay", mine["decoupled"]))
        if bool(decoupled) == mine["decoupled"] or float(other["weight_decay"]) == 0:
            return None
        was, now = ("AdamW", "Adam") if decoupled else ("Adam", "AdamW")
        return f"was saved by {was}, whose weight decay is another than that of this {now}"

"""The optimizers that `optimizer.type` can name: the keys of `optimizer.params` for each, and what they come to.

What a rule comes to is a dataclass whose fields are its hyperparameters, as a parameter group has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Betas, Flag, NoEffect, NonNegative, NotBuilt, Number, Section

__all__ = ["SGD", "Adagrad", "AdagradParams", "Lion", "LionParams", "Optimizer", "OptimizerParams", "Rule", "SGDParams"]

_Fused = Annotated[Any, NoEffect("the update is always one fused pass")]
_Graph = Annotated[Any, NoEffect("the update is not part of a CUDA graph")]
_Fp32States = Annotated[Flag | None, NotBuilt("optimizer states below fp32", neutral=(True,))]


class _Params(Section):
    """What every optimizer's `params` may have."""

    lr: NonNegative | None = None
    weight_decay: NonNegative | None = None
    fused: _Fused = None
    foreach: _Fused = None
    capturable: _Graph = None
    differentiable: Annotated[Any, NotBuilt("differentiating through the optimizer")] = None
    maximize: Annotated[Flag | None, NotBuilt("maximising the loss")] = None


@dataclass(frozen=True, slots=True)
class Rule(Resolved):
    """The base of what an optimizer comes to."""

    key: ClassVar[str] = "optimizer"
    name: ClassVar[str]
    """What a parameter group calls the rule, in its key "optimizer"."""


class OptimizerParams(_Params):
    """`optimizer.params` for Adam and AdamW."""

    betas: Betas | None = None
    eps: NonNegative | None = None
    bias_correction: Flag | None = None
    adam_w_mode: Flag | None = None
    amsgrad: Annotated[Flag | None, NotBuilt("AMSGrad")] = None
    fp32_optimizer_states: _Fp32States = None
    torch_adam: Flag | None = None


@dataclass(frozen=True, slots=True)
class Optimizer(Rule):
    """Adam with decoupled weight decay (AdamW) or, when `decoupled` is false, with L2 regularisation (Adam)."""

    name: ClassVar[str] = "adam"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True


class LionParams(_Params):
    """`optimizer.params` for Lion."""

    betas: Betas | None = None
    fp32_optimizer_states: _Fp32States = None


@dataclass(frozen=True, slots=True)
class Lion(Rule):
    """Lion, with DeepSpeed's defaults."""

    name: ClassVar[str] = "lion"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


class AdagradParams(_Params):
    """`optimizer.params` for Adagrad."""

    eps: NonNegative | None = None
    lr_decay: NonNegative | None = None
    initial_accumulator_value: NonNegative | None = None
    amsgrad: Annotated[Flag | None, NotBuilt("AMSGrad")] = None
    fp32_optimizer_states: _Fp32States = None


@dataclass(frozen=True, slots=True)
class Adagrad(Rule):
    """Adagrad, with the defaults of torch and DeepSpeed."""

    name: ClassVar[str] = "adagrad"

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10


class SGDParams(_Params):
    """`optimizer.params` for SGD."""

    momentum: NonNegative | None = None
    dampening: Number | None = None
    nesterov: Flag | None = None


@dataclass(frozen=True, slots=True)
class SGD(Rule):
    """SGD, with momentum if it is asked for; torch's defaults."""

    name: ClassVar[str] = "sgd"

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

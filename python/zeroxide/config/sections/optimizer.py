"""`optimizer`: Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Betas, Flag, NoEffect, NonNegative, NotBuilt, Section, expecting
from zeroxide.config.given import Given, agree
from zeroxide.errors import ConfigError

__all__ = ["Optimizer", "OptimizerParams", "OptimizerSection", "resolve"]

# DeepSpeed's own optimizers and torch's, which DeepSpeed takes by name.
_TO_COME = (
    *("adagrad", "lamb", "lion", "muon", "musgd", "muadam", "muadamw", "onebitadam", "onebitlamb", "zerooneadam"),
    *("sgd", "rmsprop", "adadelta", "adamax", "nadam", "radam", "asgd", "rprop", "lbfgs", "sparseadam", "adafactor"),
)


class OptimizerParams(Section):
    """`optimizer.params` for Adam and AdamW."""

    lr: NonNegative | None = None
    betas: Betas | None = None
    eps: NonNegative | None = None
    weight_decay: NonNegative | None = None
    bias_correction: Flag | None = None
    adam_w_mode: Flag | None = None
    amsgrad: Annotated[Flag | None, NotBuilt("AMSGrad")] = None
    fp32_optimizer_states: Annotated[Flag | None, NotBuilt("optimizer states below fp32", neutral=(True,))] = None
    torch_adam: Flag | None = None
    fused: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    foreach: Annotated[Any, NoEffect("the update is always one fused pass")] = None
    capturable: Annotated[Any, NoEffect("the update is not part of a CUDA graph")] = None
    differentiable: Annotated[Any, NotBuilt("differentiating through the optimizer")] = None
    maximize: Annotated[Flag | None, NotBuilt("maximising the loss")] = None


class OptimizerSection(Section):
    """`optimizer`. The keys of `params` depend on `type` and are checked once that is known."""

    type: Annotated[str, expecting("the name of an optimizer")]
    params: Annotated[dict[str, Any], expecting("an object")] = Field(default_factory=dict)
    legacy_fusion: Annotated[Any, NoEffect("the update is always one fused pass")] = None


@dataclass(frozen=True, slots=True)
class Optimizer(Resolved):
    """Adam with decoupled weight decay (AdamW) or, when `decoupled` is false, with L2 regularisation (Adam)."""

    key: ClassVar[str] = "optimizer"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True


def resolve(section: OptimizerSection | None, given: Given) -> Optimizer | None:
    """The optimizer that is asked for, None where nothing asks for one.

    As in DeepSpeed, "Adam" is AdamW unless `adam_w_mode` is false. Raises ConfigError for another type, for a key that
    does not fit, and where a shortcut contradicts the document.
    """
    base = "optimizer.params"
    params = OptimizerParams()
    shortcuts = given.shortcuts
    decoupled = True
    fallback = Optimizer()
    if section is not None:
        kind = section.type.lower()
        if kind not in ("adam", "adamw"):
            raise given.unknown_type("optimizer.type", section.type, ("Adam", "AdamW"), _TO_COME)
        if "max_grad_norm" in section.params:
            raise ConfigError(f'{given.origin}: unknown key "{base}.max_grad_norm": set "gradient_clipping" instead')
        params = given.params(OptimizerParams, "optimizer", section.params)
        decoupled = params.adam_w_mode is not False
        if params.torch_adam and decoupled and params.weight_decay is None:
            # The default of torch.optim.AdamW, which torch_adam asks for; that of torch.optim.Adam is 0.
            fallback = Optimizer(weight_decay=0.01)
        if kind == "adamw" and not decoupled:
            raise ConfigError(
                f'{given.origin}: {base}.adam_w_mode = false contradicts optimizer.type = "{section.type}"; '
                'use "Adam" for L2 regularisation',
                path=f"{base}.adam_w_mode",
            )
    lr = agree("lr", shortcuts.lr, f"{base}.lr", params.lr)
    betas = agree("betas", shortcuts.betas, f"{base}.betas", params.betas)
    eps = agree("eps", shortcuts.eps, f"{base}.eps", params.eps)
    weight_decay = agree("weight_decay", shortcuts.weight_decay, f"{base}.weight_decay", params.weight_decay)
    if section is None and lr is None and betas is None and eps is None and weight_decay is None:
        return None
    return Optimizer(
        lr=fallback.lr if lr is None else lr,
        betas=fallback.betas if betas is None else betas,
        eps=fallback.eps if eps is None else eps,
        weight_decay=fallback.weight_decay if weight_decay is None else weight_decay,
        decoupled=decoupled,
        bias_correction=params.bias_correction is not False,
    )

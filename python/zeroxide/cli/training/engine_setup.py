"""The model handed over to zeroxide: weight source, parameter groups, schedule, config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zeroxide.cli.training.models import ModelChoice
from zeroxide.cli.training.options import TrainOptions
from zeroxide.cli.training.schedule import fraction_of_peak
from zeroxide.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["engine_config", "make_engine"]

_BETAS = (0.9, 0.95)


def make_engine(
    options: TrainOptions,
    choice: ModelChoice,
    model: PreTrainedModel,
    initialize: Callable[..., Any] | None,
    durable_name: str = "",
) -> tuple[Any, list[str]]:
    """Hand the model to zeroxide and return the engine, with one note per thing worth telling the user.

    durable_name: the name of the run's commits on disk, where `options` ask for such.
    """
    from zeroxide.cli.training.from_safetensors import FromSafetensors
    from zeroxide.cli.training.from_scratch import FromScratch
    from zeroxide.cli.training.loss import causal_lm_loss, without_logits

    notes: list[str] = []
    weights: FromSafetensors | FromScratch
    bias_lr = options.lr
    if choice.has_weights and choice.directory is not None:
        weights = FromSafetensors(model, choice.directory)
        if weights.unexpected:
            more = f" and {len(weights.unexpected) - 3} more" if len(weights.unexpected) > 3 else ""
            notes.append(f"not part of this model, left out: {', '.join(weights.unexpected[:3])}{more}")
    else:
        weights = FromScratch(model, options.seed)
        bias_lr = options.bias_lr
    model.loss_function = causal_lm_loss
    if options.loss_chunk:
        without_logits(model, options.loss_chunk)
    if options.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"{choice.name} does not support activation checkpointing")
        # The method was renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    if initialize is None:
        import zeroxide

        initialize = zeroxide.initialize
    engine, *_ = initialize(
        model=model,
        model_parameters=_parameter_groups(model, options, bias_lr),
        lr_scheduler=lambda optimizer: _scheduler(optimizer, options),
        config=engine_config(options, durable_name),
        offload=options.offload,
        host_memory=options.host_memory,
        weights=weights,
    )
    return engine, notes


def _scheduler(optimizer: torch.optim.Optimizer, options: TrainOptions) -> torch.optim.lr_scheduler.LRScheduler:
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda step: fraction_of_peak(step, options))


def _parameter_groups(model: torch.nn.Module, options: TrainOptions, bias_lr: float) -> list[dict[str, Any]]:
    """Split the parameters: decay matrices, leave vectors (biases, norms) alone, and train biases at their own rate.

    What a young model learns first is one direction in its activations that depends on no input: how frequent each
    token is. Adam moves each element by about the rate, and one of a matrix acts through hundreds of inputs, one of a
    bias through none. At one rate matrices make that direction, as a product with the input, which comes out with the
    wrong sign for some inputs, at some step (docs/recipe.md). Weights that are loaded know it already.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for _, parameter in named if parameter.ndim >= 2]
    vectors = [(name.rpartition(".")[2], parameter) for name, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": [parameter for name, parameter in vectors if name != "bias"], "lr": options.lr, "weight_decay": 0.0},
        {"params": [parameter for name, parameter in vectors if name == "bias"], "lr": bias_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def engine_config(options: TrainOptions, durable_name: str) -> dict[str, Any]:
    """The config of the run's engine; durable_name as `make_engine` has it."""
    return {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.clip,
        "steps_per_print": math.inf,
        "bf16": {"enabled": options.dtype == "bf16"},
        "fp16": {"enabled": options.dtype == "fp16"},
        # Whatever dtype a model folder has.
        "data_types": {"param_dtype": options.dtype},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.lr, "betas": list(_BETAS), "weight_decay": options.weight_decay},
        },
        "zeroxide": {
            "format": options.format,
            "io_engine": options.io_engine,
            "threads": options.threads,
            "recompute": int(options.recompute) if options.recompute.isdecimal() else options.recompute,
            **_activations(options),
            **_row_blocks(options.row_bytes),
            **_early_updates(options.update_in_backward),
            **({"durable_every": options.durable_every, "durable_name": durable_name} if options.durable_every else {}),
        },
    }


def _row_blocks(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    return {"row_bytes": int(given) if given.isdecimal() else given}


def _early_updates(given: str) -> dict[str, Any]:
    return {} if given == "never" else {"update_in_backward": True if given == "always" else given}


def _activations(options: TrainOptions) -> dict[str, Any]:
    """Where activations wait for backward."""
    if options.activation_path is None:
        return {}
    home = "disk" if options.host_memory is None else "auto"
    return {"activations": home, "activation_path": options.activation_path}

"""`deepspeed.init_inference`: a model in one dtype on this process's device, or with its weights offloaded.

DeepSpeed replaces layers by its own kernels and cuts them over ranks; here the model computes with torch's, on one
rank. With `zero` the weights are an engine's at stage 3 and come for each module that is run, from host memory or disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroxide.distributed import init_distributed
from zeroxide.engine.entry import initialize
from zeroxide.errors import ConfigError, ModelError
from zeroxide.integrations.deepspeed.accelerator import get_accelerator
from zeroxide.integrations.deepspeed.logging import logger
from zeroxide.params.handle import handle_of

__all__ = ["InferenceEngine", "init_inference"]

_DTYPES = {
    "fp32": torch.float32,
    "float": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
_ALIASES = {"tp": "tensor_parallel", "kernel_inject": "replace_with_kernel_inject", "max_tokens": "max_out_tokens"}
_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "checkpoint": (None,),
    "enable_cuda_graph": (False,),
    "ep_size": (1,),
    "moe": (False, {}),
    "mp_size": (1,),
    "mpu": (None,),
    "quant": ({}, {"enabled": False}),
    "save_mp_checkpoint_path": (None,),
    "set_empty_params": (False,),
    "tensor_parallel": ({}, {"tp_size": 1}, {"enabled": False}, {"enabled": True, "tp_size": 1}),
    "triton_autotune": (False,),
    "use_triton": (False,),
}
"""Keys of DeepSpeed 0.19.8's inference config that ask for something not built, but with one of these values."""
_NO_EFFECT: Mapping[str, str] = {
    "base_dir": "no checkpoint is read",
    "injection_dict": "layers are not replaced",
    "injection_policy": "layers are not replaced",
    "injection_policy_tuple": "layers are not replaced",
    "min_out_tokens": "memory for tokens is taken as they come",
    "min_tokens": "memory for tokens is taken as they come",
    "replace_method": "layers are not replaced",
    "replace_with_kernel_inject": "layers are not replaced: the model computes with torch's kernels",
    "return_tuple": "layers are not replaced",
    "transposed_mode": "layers are not replaced",
}
_USED = frozenset({"dtype", "keep_module_on_host", "max_out_tokens", "zero"})


class InferenceEngine(nn.Module):
    """A model for inference. Made by `init_inference`; an attribute that it does not have is the model's."""

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = model
        self.inference_config = dict(config)
        """The keys as given."""
        self.max_out_tokens: int = config.get("max_out_tokens", 1024)
        # Beside the modules: its weights are those of `module`.
        object.__setattr__(self, "_engine", None)

    def _give(self, engine: Any) -> None:
        object.__setattr__(self, "_engine", engine)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return (self.module if self._engine is None else self._engine)(*inputs, **kwargs)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's `generate`. Raises ModelError for a model without, or a prompt beyond `max_out_tokens`."""
        if not hasattr(self.module, "generate"):
            raise ModelError(f"generate: a {type(self.module).__name__} has no such method")
        prompt = kwargs.get("input_ids", kwargs.get("inputs", inputs[0] if inputs else None))
        if isinstance(prompt, torch.Tensor) and prompt.dim() == 2 and prompt.shape[1] > self.max_out_tokens:
            raise ModelError(
                f"generate: a prompt of {prompt.shape[1]} tokens, and max_out_tokens is {self.max_out_tokens}: raise it"
            )
        generate: Any = self.module.generate
        return generate(*inputs, **kwargs)

    def destroy(self) -> None:
        """Ends the engine that has the weights, if there is one."""
        if self._engine is not None:
            self._engine.destroy()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or (name.startswith("__") and name.endswith("__")):
                raise
        return getattr(module, name)


def init_inference(
    model: nn.Module, config: Mapping[str, Any] | str | Path | None = None, **kwargs: Any
) -> InferenceEngine:
    """A model for inference, in eval mode; DeepSpeed's signature, and its defaults: fp16, 1024 tokens.

    config, kwargs: keys of DeepSpeed's inference config. `dtype`: a torch dtype, or "fp32", "fp16", "bf16". `zero`:
    what "zero_optimization" is in a training config, at stage 3. `keep_module_on_host`: the model stays where it is.

    Raises ConfigError for a key with two values, an unknown one, or one that asks for what is not built, ModelError for
    a model that an engine has.
    """
    asked = _merged(_read(config), kwargs)
    dtype = _checked(asked)
    _check_free(model)
    zero = asked.get("zero") or {}
    engine = InferenceEngine(model, asked)
    if zero:
        init_distributed(verbose=False)
        precision = {torch.float16: {"fp16": {"enabled": True}}, torch.bfloat16: {"bf16": {"enabled": True}}}
        given = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, **zero},
            **precision.get(dtype, {}),
        }
        trained = [param for param in model.parameters() if param.requires_grad]
        for param in trained:
            param.requires_grad_(False)
        try:
            engine._give(initialize(model=model, config=given)[0])
        except BaseException:
            for param in trained:
                param.requires_grad_(True)
            raise
    else:
        model.to(dtype)
        if not asked.get("keep_module_on_host", False):
            model.to(get_accelerator().current_device_name())
    engine.eval()
    return engine


def _check_free(model: nn.Module) -> None:
    """Raises ModelError for a model that an engine has."""
    for name, param in model.named_parameters():
        handle = handle_of(param)
        if handle is not None and handle.in_engine:
            raise ModelError(
                f"init_inference: {name} has its values in an engine: call that, or destroy it before at stages 0 to 2",
                name=name,
            )


def _read(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    if not isinstance(config, str | Path):
        raise ConfigError(
            f"init_inference: config: expected a dict or a path, got {type(config).__name__}", path="config"
        )
    try:
        found = json.loads(Path(config).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_inference: {config}: {error}", path="config") from error
    if not isinstance(found, dict):
        raise ConfigError(f"init_inference: {config}: expected an object, got {type(found).__name__}", path="config")
    return found


def _merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in [*given.items(), *more.items()]:
        name = _ALIASES.get(key, key)
        if name in merged and merged[name] != value:
            raise ConfigError(
                f"init_inference: {name} is {merged[name]!r} in one place and {value!r} in another: give one", path=name
            )
        merged[name] = value
    return merged


def _checked(asked: Mapping[str, Any]) -> torch.dtype:
    """Refuses what is not built, says what has no effect, and returns the dtype."""
    for key, value in asked.items():
        if key in _NO_EFFECT:
            logger.warning("init_inference: %s has no effect: %s", key, _NO_EFFECT[key])
        elif key in _NOT_BUILT:
            if value not in _NOT_BUILT[key]:
                raise ConfigError(f"init_inference: {key}={value!r} is not built in zeroxide yet", path=key)
        elif key not in _USED:
            raise ConfigError(f"init_inference: unknown key {key!r}", path=key)
    tokens = asked.get("max_out_tokens", 1024)
    if type(tokens) is not int or tokens <= 0:
        raise ConfigError(
            f"init_inference: max_out_tokens: expected a number above 0, got {tokens!r}", path="max_out_tokens"
        )
    zero = asked.get("zero") or {}
    if not isinstance(zero, Mapping) or zero.get("stage", 3) != 3:
        raise ConfigError(f"init_inference: zero: expected a section for stage 3, got {zero!r}", path="zero")
    if zero and "keep_module_on_host" in asked:
        logger.warning("init_inference: keep_module_on_host has no effect: zero says where the weights are")
    dtype = asked.get("dtype", torch.float16)
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ConfigError(f"init_inference: dtype: expected fp32, fp16 or bf16, got {dtype!r}", path="dtype")
    assert isinstance(found, torch.dtype)
    return found

"""The strategy for `lightning.fabric.Fabric`, and the precision that goes with it.

`fabric.setup(model, optimizer)` makes an engine; `optimizer.step()` is one of its steps, whatever micro-batches came
before it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl, _Sharded
from lightning.fabric.utilities.init import _EmptyInit
from lightning.fabric.utilities.types import _Stateful
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.optim import Optimizer

from zeroxide.device.placement import is_host
from zeroxide.distributed.process_group import DEFAULT_TIMEOUT_SECONDS, default_backend
from zeroxide.engine.engine import Engine
from zeroxide.engine.entry import initialize
from zeroxide.errors import ModelError
from zeroxide.integrations.lightning.folder import exact_state_dict, load_folder, load_weights, save_folder
from zeroxide.integrations.lightning.precision import EnginePrecision
from zeroxide.integrations.lightning.settings import Settings, refused
from zeroxide.zero import Init

__all__ = ["ZeroxideFabricPrecision", "ZeroxideFabricStrategy"]


class ZeroxideFabricPrecision(EnginePrecision, Precision):
    """What the engine computes in; see `EnginePrecision`. Outputs of the model are of torch's default dtype."""

    def convert_output(self, data: Any) -> Any:
        """Floating-point tensors in torch's default dtype, as Lightning's own precisions have them."""
        if self.dtype is torch.float32:
            return data
        dtype = torch.get_default_dtype()
        return apply_to_collection(data, function=_convert_fp_tensor, dtype=torch.Tensor, dst_type=dtype)


class _NoSync(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Gradients stay on their rank until the next backward outside."""
        return module.no_sync() if enabled and isinstance(module, Engine) else nullcontext()


class ZeroxideFabricStrategy(DDPStrategy, _Sharded):
    """Trains modules of plain loops in engines, on one rank or several, on CPUs or GPUs.

    The arguments are those of `ZeroxideStrategy`. Each `fabric.setup` makes an engine, which is what it returns inside
    its wrapper (`model._forward_module`).
    """

    def __init__(
        self,
        stage: int | None = None,
        offload: str | None = None,
        nvme_path: str | Path | None = None,
        host_memory: int | str | None = None,
        config: dict[str, Any] | str | Path | None = None,
        *,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(seconds=DEFAULT_TIMEOUT_SECONDS),
    ) -> None:
        self.settings = Settings(stage, offload, nvme_path, host_memory, config)
        self.engines: list[Engine] = []
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._backward_sync_control = _NoSync()

    @property
    def precision(self) -> Precision:
        """What Fabric's `precision` means here."""
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if precision is not None and not isinstance(precision, ZeroxideFabricPrecision):
            # Fabric knows no precision of another's strategy and has made one that opens an autocast.
            precision = ZeroxideFabricPrecision(precision.precision)
        self._precision = precision

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and not is_host(self.root_device):
            return default_backend()
        return super()._get_process_group_backend()

    # Models and optimizers ----------------------------------------------------------------------------------------

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """An engine that trains `module` with one optimizer; a schedule over that goes on driving its groups."""
        if len(optimizers) != 1:
            raise refused(f"{len(optimizers)} optimizers", "an engine has one, with as many groups as you like")
        engine = self._engine(module, optimizers[0])
        engine.set_gradient_accumulation_boundary(True)
        return engine, [engine.optimizer], scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """An engine that only evaluates `module`."""
        return self._engine(module, None)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Raises ModelError: an engine is made of both."""
        raise ModelError("an engine is made of model and optimizer: call fabric.setup(model, optimizer)")

    def _engine(self, module: nn.Module, optimizer: Optimizer | None) -> Engine:
        config = self.settings.config_for(self.world_size)
        engine, *_ = initialize(
            model=module,
            optimizer=optimizer,
            config={key: value for key, value in config.items() if key not in ("optimizer", "scheduler")},
            dtype=self.settings.dtype_for(self.precision.precision),
            host_memory=self.settings.host_memory,
        )
        self.engines = [each for each in self.engines if each.parts.core.alive]
        self.engines.append(engine)
        return engine

    def module_to_device(self, module: nn.Module) -> None:
        """The engine brings weights to where the model computes."""

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Modules are built in host memory, in slices at stage 3."""
        stack = ExitStack()
        stack.enter_context(_EmptyInit(enabled=bool(empty_init)))
        stack.enter_context(self.precision.module_init_context())
        stack.enter_context(self.module_sharded_context())
        return stack

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Modules are built in slices at stage 3."""
        return Init(config_dict_or_path=self.settings.home, enabled=self.settings.stage == 3)

    # Steps --------------------------------------------------------------------------------------------------------

    def backward(self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """The engine's. Raises ModelError where there are several and none is named."""
        if module is None:
            trains = [each for each in self.engines if each.parts.core.alive and each.optimizer is not None]
            if len(trains) != 1:
                raise ModelError(f"{len(trains)} models are trained: say which, fabric.backward(loss, model=model)")
            module = trains[0]
        assert isinstance(module, Engine)
        assert not args, "a scalar loss takes no gradient"
        module.backward(tensor, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any = None, **kwargs: Any) -> Any:
        """Runs the closure, if there is one, and then the engine's step."""
        result = None if closure is None else closure()
        engine = self._engine_of(optimizer)
        engine.step(**kwargs)
        engine.set_gradient_clipping(self.settings.clipping)
        return result

    def _engine_of(self, optimizer: Any) -> Engine:
        for each in self.engines:
            if each.optimizer is optimizer:
                return each
        raise ModelError("the optimizer is no engine's: call fabric.setup(model, optimizer)")

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor:
        """Has the engine clip at the step that follows; the norm of what has been accumulated. Every rank calls it.

        Raises ConfigError for other norms than the 2-norm, RuntimeError as torch does for one that is not finite.
        """
        if float(norm_type) != 2.0:
            raise refused(f"norm_type={norm_type}", "gradients are clipped by their 2-norm")
        engine = self._engine_of(optimizer)
        norm = engine.measure_grad_norm()
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the norm of the gradients is {norm.item()}: pass error_if_nonfinite=False to go on")
        engine.set_gradient_clipping(max_norm)
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Raises ConfigError."""
        raise refused(f"clip_val={clip_val}", "gradients are clipped by their norm: pass max_norm")

    # Checkpoints --------------------------------------------------------------------------------------------------

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """All weights and buffers, of an engine's module on rank 0 alone. Every rank calls it."""
        if not isinstance(module, Engine):
            return module.state_dict()
        if self.precision.precision.endswith("-mixed") and module.optimizer is not None:
            return exact_state_dict(module)
        return module.module_state_dict()

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Loads weights and buffers, into an engine's module as well."""
        if isinstance(module, Engine):
            module.load_module_state_dict(state_dict, strict=strict)
        else:
            module.load_state_dict(state_dict, strict=strict)

    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: dict[str, Any] | None = None
    ) -> None:
        """A folder with the checkpoint of the engine in `state`, and the rest beside it; without one, Fabric's file."""
        name = _engine_in(state)
        if name is None or state[name].optimizer is None:
            super().save_checkpoint(path, state, storage_options, filter)
            return
        if storage_options is not None or filter is not None:
            raise refused("storage_options" if storage_options is not None else "filter", "the engine saves as it is")
        engine = state[name]
        rest = {
            key: value.state_dict() if isinstance(value, _Stateful) else value
            for key, value in state.items()
            if value is not engine and value is not engine.optimizer
        }
        save_folder(engine, Path(self.broadcast(str(path))), rest, self.broadcast)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a folder into the engine in `state`, at any number of ranks, and a file as Fabric does.

        Returns what `state` does not ask for.
        """
        place = Path(self.broadcast(str(path)))
        if not place.is_dir():
            return super().load_checkpoint(place, state, strict, weights_only)
        wanted = {"model": state} if isinstance(state, nn.Module) else state or {}
        name = _engine_in(wanted)
        if name is None:
            raise ModelError(f"{place} is an engine's: pass the model, as in fabric.load(path, {{'model': model}})")
        engine: Any = wanted[name]

        def read(file: Path) -> dict[str, Any]:
            return self.checkpoint_io.load_checkpoint(file, weights_only=weights_only)

        if engine.optimizer is None:
            rest = load_weights(engine, place, read, strict=strict)
        else:
            resume = any(value is engine.optimizer for value in wanted.values())
            rest = load_folder(engine, place, read, strict=strict, resume=resume)
        for key, value in list(wanted.items()):
            if value is engine or value is engine.optimizer:
                continue
            if key not in rest:
                if strict:
                    raise KeyError(f"{place} has no {key!r}: pass strict=False to leave it as it is")
            elif isinstance(value, _Stateful):
                value.load_state_dict(rest.pop(key))
            else:
                wanted[key] = rest.pop(key)
        return rest

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Nothing: importing `zeroxide.integrations.lightning` registers all names."""


def _engine_in(state: dict[str, Any]) -> str | None:
    """The name of the engine; None without one. Raises ModelError for several."""
    names = [name for name, value in state.items() if isinstance(value, Engine)]
    if len(names) > 1:
        raise ModelError(f"a checkpoint is of one engine, and {' and '.join(names)} are several: save them one by one")
    return names[0] if names else None

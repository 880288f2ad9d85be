"""The strategy for `lightning.pytorch.Trainer`, and the precision that goes with it.

Lightning counts micro-batches, steps schedules and says when a step is due; the engine computes, and every step that it
is asked for is an optimizer step. Weights are the engine's from the beginning of a run until another run needs them
otherwise: `trainer.test` after `trainer.fit` goes on with the same engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.init import _EmptyInit
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from zeroxide.device.placement import is_host
from zeroxide.distributed.process_group import DEFAULT_TIMEOUT_SECONDS, default_backend
from zeroxide.engine.engine import Engine
from zeroxide.engine.entry import initialize
from zeroxide.errors import ModelError
from zeroxide.integrations.lightning.folder import exact_state_dict, load_folder, load_weights, save_folder
from zeroxide.integrations.lightning.precision import EnginePrecision
from zeroxide.integrations.lightning.settings import Settings, refused
from zeroxide.integrations.ownership import Ownership, owner_of
from zeroxide.params.callers import called_by
from zeroxide.zero import Init

__all__ = ["ZeroxidePrecision", "ZeroxideStrategy"]

_DUMPING = frozenset({"_get_lightning_module_state_dict"})
"""The function of Lightning's (2.6.6, checkpoint_connector.py) that puts the weights into every checkpoint's dict."""


class ZeroxidePrecision(EnginePrecision, Precision):
    """What the engine computes in; see `EnginePrecision`."""

    clip: Callable[[float], None] | None = None
    """Has the engine clip at the next step; the strategy sets it."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Steps that evaluate run without inference mode: what the engine makes in one, training would go on with."""
        if not torch.is_inference_mode_enabled():
            yield
            return
        with torch.inference_mode(False), torch.no_grad():
            yield

    def backward(  # type: ignore[override]
        self, tensor: torch.Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The engine's, of a loss that Lightning has divided; a module's own `backward` is given the scaled loss."""
        engine = _strategy_of(model).engine
        if is_overridden("backward", model):
            model.backward(engine.scale(tensor), *args, **kwargs)
        else:
            assert not args, "a scalar loss takes no gradient"
            engine.backward(tensor, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure, then the hooks, of which one may clip, then the engine's step. Returns the loss."""
        strategy = _strategy_of(model)
        loss = closure()
        strategy.engine.set_gradient_clipping(strategy.settings.clipping)
        self._after_closure(model, optimizer)
        strategy.engine.step(**kwargs)
        return loss

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Has the engine clip by the norm at the step that follows. Raises ConfigError for other ways of clipping."""
        if clip_val <= 0:
            return
        if gradient_clip_algorithm not in (None, GradClipAlgorithmType.NORM):
            raise refused(
                f"gradient_clip_algorithm={str(gradient_clip_algorithm)!r}", 'gradients are clipped by "norm"'
            )
        assert self.clip is not None, "the strategy has said who clips"
        self.clip(clip_val)


class ZeroxideStrategy(DDPStrategy):
    """Trains a LightningModule in an engine, on one rank or several, on CPUs or GPUs.

    stage, offload, nvme_path, host_memory, config: see `Settings`.
    process_group_backend, timeout: of the process group, which is made where there is none; by default one that carries
        tensors in host memory, too.

    `configure_optimizers` gives one optimizer, of torch or zeroxide, unless the config has one. What does not go with
    an engine is refused by name when a run begins.
    """

    strategy_name = "zeroxide"

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
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(seconds=DEFAULT_TIMEOUT_SECONDS),
    ) -> None:
        self.settings = Settings(stage, offload, nvme_path, host_memory, config)
        self._owner: Ownership | None = None
        self._from_file = False
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def engine(self) -> Engine:
        """What trains or evaluates the model. Raises ModelError before a run has begun and after the engine's end."""
        if self._owner is None or self._owner.engine is None:
            raise ModelError(
                "the strategy has no engine: it makes one when trainer.fit, validate, test or predict begins"
            )
        return self._owner.engine

    @property
    def precision_plugin(self) -> Precision:
        """What the Trainer's `precision` means here."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None and not isinstance(precision_plugin, ZeroxidePrecision):
            # Lightning knows no precision of another's strategy and has made one that opens an autocast.
            precision_plugin = ZeroxidePrecision(precision_plugin.precision)
        if precision_plugin is not None:
            precision_plugin.clip = lambda norm: self.engine.set_gradient_clipping(norm)
        self._precision_plugin = precision_plugin

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and not is_host(self.root_device):
            return default_backend()
        return super()._get_process_group_backend()

    # A run begins and ends ----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        """Makes the engine, or goes on with the one that has the module's weights where nothing is to be trained."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, fitting = self.lightning_module, trainer.state.fn == TrainerFn.FITTING
        assert module is not None
        owner = owner_of(module)
        if owner is not None and fitting:
            owner.give_back()
        if owner is None or fitting:
            if fitting:
                self._check(trainer)
            self.precision_plugin.convert_module(module)
            owner = self._take(trainer, module) if fitting else self._look(trainer, module)
        self._owner = owner
        self.model = self.engine
        self.barrier()

    def _check(self, trainer: pl.Trainer) -> None:
        if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE and trainer.gradient_clip_val:
            raise refused('gradient_clip_algorithm="value"', 'gradients are clipped by "norm"')
        own, asked = self.settings.clipping, trainer.gradient_clip_val
        if own and asked is not None and asked != own:
            raise refused(f"gradient_clip_val={asked}", f"the config has gradient_clipping {own}; say one of them")
        if self._layer_sync is not None:
            raise refused("sync_batchnorm=True", "batch norms take the statistics of their own rank")
        for each in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(each, StochasticWeightAveraging | WeightAveraging):
                raise refused(type(each).__name__, "it copies weights from and into a model that has them itself")

    def _take(self, trainer: pl.Trainer, module: pl.LightningModule) -> Ownership:
        config = self.settings.config_for(self.world_size, trainer.accumulate_grad_batches)
        self._reset_optimizers_and_schedulers()
        if not config.get("optimizer"):
            self.setup_optimizers(trainer)
            if len(self.optimizers) != 1:
                raise refused(f"{len(self.optimizers)} optimizers", "an engine has one, which may have many groups")
        owner = Ownership.of(module, trains=True)
        engine, optimizer, _, scheduler = initialize(
            model=module,
            optimizer=self.optimizers[0] if self.optimizers else None,
            config=config,
            dtype=self.settings.dtype_for(self.precision_plugin.precision),
            host_memory=self.settings.host_memory,
        )
        owner.belongs_to(module, engine)
        engine.set_gradient_accumulation_boundary(True)
        self.optimizers = [optimizer]
        if scheduler is not None:
            # Lightning steps it, shows it to callbacks and saves it.
            engine.lr_scheduler = None
            self.lr_scheduler_configs = [LRSchedulerConfig(scheduler, interval="step")]
        return owner

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> Ownership:
        config = self.settings.config_for(self.world_size, trainer.accumulate_grad_batches)
        config = {key: value for key, value in config.items() if key not in ("optimizer", "scheduler")}
        owner = Ownership.of(module, trains=False)
        engine, *_ = initialize(
            model=module,
            config=config,
            dtype=self.settings.dtype_for(self.precision_plugin.precision),
            host_memory=self.settings.host_memory,
        )
        owner.belongs_to(module, engine)
        return owner

    def model_to_device(self) -> None:
        """The engine brings weights to where the model computes."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Modules are built in host memory, whatever computes."""
        with _EmptyInit(enabled=bool(empty_init)), self.precision_plugin.tensor_init_context():
            yield

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """`configure_model` builds modules in slices at stage 3."""
        with Init(config_dict_or_path=self.settings.home, enabled=self.settings.stage == 3):
            yield

    def teardown(self) -> None:
        """Waits for a save in the background. An engine that trains stays, so that the model can be saved and tested;
        one that has evaluated a whole model gives it back."""
        owner = self._owner
        if owner is not None and owner.engine is not None:
            owner.engine.wait_for_checkpoint()
            if owner.has_all:
                owner.give_back()
                self.model = self.lightning_module
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # Checkpoints --------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The engine loads."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether optimizer state is in what Lightning has loaded: a file of another strategy's."""
        return self._from_file

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights and buffers on rank 0, in fp32 with mixed precision; an empty dict elsewhere. Every rank calls it.

        In a checkpoint's dict they are not, at stage 3: the engine saves them itself.
        """
        assert self.lightning_module is not None
        if called_by("lightning", _DUMPING):
            return _Elsewhere() if self.settings.stage == 3 else self.lightning_module.state_dict()
        if self._owner is None or self._owner.engine is None:
            return self.lightning_module.state_dict()
        if self.precision_plugin.precision.endswith("-mixed"):
            return exact_state_dict(self.engine)
        return self.engine.module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: the engine saves it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder with the engine's own checkpoint; weights alone are one file, which every strategy loads."""
        if storage_options is not None:
            raise refused("storage_options", "the engine writes checkpoints itself")
        path = Path(self.broadcast(str(filepath)))
        if "optimizer_states" not in checkpoint:
            checkpoint["state_dict"] = self.lightning_module_state_dict()
            if self.is_global_zero:
                self.checkpoint_io.remove_checkpoint(path)
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        save_folder(self.engine, path, rest, self.broadcast)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a folder into the engine, at any number of ranks, or reads a file, which Lightning takes over."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self._from_file = not path.is_dir()
        if self._from_file:
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        module = self.lightning_module
        assert module is not None

        def read(file: Path) -> dict[str, Any]:
            return self.checkpoint_io.load_checkpoint(file, weights_only=weights_only)

        if self.engine.optimizer is None:
            return load_weights(self.engine, path, read, strict=module.strict_loading)
        resume = module.trainer.state.fn == TrainerFn.FITTING
        return load_folder(self.engine, path, read, strict=module.strict_loading, resume=resume)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Gives the engine the weights of a file; those of a folder it has."""
        if self._from_file:
            self.engine.load_module_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Gives the engine optimizer state out of a file, as torch's optimizer has saved it."""
        states = checkpoint["optimizer_states"]
        if len(states) != 1:
            raise refused(f"{len(states)} optimizers", "the checkpoint has the state of so many; an engine has one")
        self.engine.optimizer.load_state_dict(states[0])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a folder or a file, after a save that may be writing there."""
        if self._owner is not None and self._owner.engine is not None:
            self._owner.engine.wait_for_checkpoint()
        super().remove_checkpoint(filepath)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Nothing: importing `zeroxide.integrations.lightning` registers all names."""


class _Elsewhere(dict[str, Any]):
    """Stands for the weights in a checkpoint's dict."""

    def __missing__(self, name: str) -> Any:
        raise ModelError(
            f"{name} is not in this dict: at stage 3 the engine saves weights itself; "
            "trainer.strategy.lightning_module_state_dict() has all of them, on rank 0",
            name=name,
        )


def _strategy_of(model: pl.LightningModule) -> ZeroxideStrategy:
    strategy = model.trainer.strategy
    assert isinstance(strategy, ZeroxideStrategy), "the precision comes with its strategy"
    return strategy

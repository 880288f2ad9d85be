"""From what the user wrote to what the engine reads: defaults, the batch equation, and the rules between keys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from zeroxide.config.check import nearest, show, validate
from zeroxide.config.resolve_precision import resolve_precision
from zeroxide.config.resolved import Config, Dtype, Offload, Optimizer, Scheduler
from zeroxide.config.schema import (
    Document,
    OptimizerParams,
    SchedulerParams,
    WarmupCosineParams,
    WarmupDecayParams,
    WarmupParams,
    Zeroxide,
)
from zeroxide.config.schema import Optimizer as OptimizerSection
from zeroxide.config.schema import Scheduler as SchedulerSection
from zeroxide.config.schema_zero import LeafModule, OffloadOptimizer, OffloadParam, ZeroOptimization
from zeroxide.config.shortcuts import Shortcuts, agree
from zeroxide.errors import ConfigError

__all__ = ["resolve"]

logger = logging.getLogger("zeroxide")

NoEffects = list[tuple[str, str]]

# DeepSpeed's own optimizers and torch's, which DeepSpeed takes by name.
_OPTIMIZERS_TO_COME = (
    *("adagrad", "lamb", "lion", "muon", "musgd", "muadam", "muadamw", "onebitadam", "onebitlamb", "zerooneadam"),
    *("sgd", "rmsprop", "adadelta", "adamax", "nadam", "radam", "asgd", "rprop", "lbfgs", "sparseadam", "adafactor"),
)
_SCHEDULES: dict[str, type[SchedulerParams]] = {
    "WarmupLR": WarmupParams,
    "WarmupDecayLR": WarmupDecayParams,
    "WarmupCosineLR": WarmupCosineParams,
}
_SCHEDULES_TO_COME = ("LRRangeTest", "OneCycle")


def resolve(
    data: Mapping[str, Any],
    keywords: Mapping[str, Any],
    *,
    world_size: int,
    origin: str,
    own_dtype: Callable[[], Dtype] | None = None,
) -> Config:
    """Return the config that `data` (a parsed document) and `keywords` (shortcuts) come to on `world_size` processes.

    `own_dtype` is as for `load`. Raises `ConfigError`.
    """
    no_effect: NoEffects = []
    document = validate(Document, data, origin=origin, no_effect=no_effect)
    shortcuts = validate(Shortcuts, keywords, origin="keyword arguments", no_effect=[])
    own = document.zeroxide or Zeroxide()
    zero = document.zero_optimization

    precision = resolve_precision(document, shortcuts, own.format, no_effect, own_dtype)
    stage, offload_param, offload_optimizer = _offload(zero, shortcuts)
    batch, micro, accumulation = _batch(document, shortcuts, world_size)
    clipping = agree("gradient_clipping", shortcuts.gradient_clipping, "gradient_clipping", document.gradient_clipping)
    compute_norm = _compute_norm(zero, stage, clipping)
    host_memory = agree("host_memory", shortcuts.host_memory, "zeroxide.host_memory", own.host_memory)
    optimizer = _optimizer(document.optimizer, shortcuts, origin, no_effect)
    leaf = (zero.leaf_module if zero is not None else None) or LeafModule()
    return Config(
        stage=stage,
        precision=precision.precision,
        precision_asked=precision.precision_asked,
        autocast=precision.autocast,
        cast_inputs=precision.cast_inputs,
        loss_scale=precision.loss_scale,
        check_overflow=precision.check_overflow,
        format=precision.format,
        grad_dtype=precision.grad_dtype,
        reduce_dtype=precision.reduce_dtype,
        reduce_sum=document.gradient_allreduce_op == "sum",
        transport=own.transport,
        rank_timeout=Config.rank_timeout if own.rank_timeout is None else own.rank_timeout,
        buffer_dtype=precision.buffer_dtype,
        keep_in_fp32=precision.keep_in_fp32,
        train_batch_size=batch,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        managed_gradient_accumulation=document.managed_gradient_accumulation,
        gradient_clipping=Config.gradient_clipping if clipping is None else clipping or None,
        clipping_is_default=clipping is None,
        compute_grad_norm=compute_norm,
        dataloader_drop_last=document.dataloader_drop_last,
        optimizer=optimizer,
        scheduler=_scheduler(document.scheduler, origin, no_effect),
        offload_param=offload_param,
        offload_optimizer=offload_optimizer,
        leaf_classes=tuple(leaf.classes or ()),
        leaf_names=tuple(leaf.names or ()),
        leaf_suffixes=tuple(leaf.name_suffixes or ()),
        host_memory=host_memory,
        unit_bytes=own.unit_bytes,
        staging_bytes=_staging(own, host_memory),
        tile_bytes=own.tile_bytes,
        prefetch=Config.prefetch if own.prefetch is None else own.prefetch,
        io_engine=own.io_engine,
        queue_depth=(document.aio.queue_depth if document.aio else None) or Config.queue_depth,
        threads=own.threads,
        trim_libraries=own.trim_libraries,
        checkpoint_background=_background(document, own),
        checkpoint_memory=own.checkpoint_memory,
        steps_per_print=document.steps_per_print,
        wall_clock_breakdown=document.wall_clock_breakdown,
        no_effect=no_effect,
        source=dict(data),
    )


def _batch(document: Document, shortcuts: Shortcuts, world_size: int) -> tuple[int | None, int | None, int]:
    """Solve train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * world_size."""
    batch, micro = document.train_batch_size, document.train_micro_batch_size_per_gpu
    steps = agree(
        "gradient_accumulation_steps",
        shortcuts.gradient_accumulation_steps,
        "gradient_accumulation_steps",
        document.gradient_accumulation_steps,
    )
    if batch is None:
        steps = steps or 1
        return (None if micro is None else micro * steps * world_size), micro, steps
    if micro is not None and steps is None:
        steps, rest = divmod(batch, micro * world_size)
        unknown = "gradient_accumulation_steps"
    else:
        steps = steps or 1
        derived, rest = divmod(batch, steps * world_size)
        unknown = "train_micro_batch_size_per_gpu"
        if micro is not None and (rest or derived != micro):
            raise ConfigError(
                f"train_batch_size = {batch} is not train_micro_batch_size_per_gpu {micro} * "
                f"gradient_accumulation_steps {steps} * world size {world_size} = {micro * steps * world_size}",
                path="train_batch_size",
                expected=str(micro * steps * world_size),
                got=str(batch),
            )
        micro = derived
    if rest:
        divisor = (micro or 1) * world_size if unknown == "gradient_accumulation_steps" else steps * world_size
        raise ConfigError(
            f"train_batch_size = {batch} leaves no whole {unknown}: it is not a multiple of {divisor} "
            f"(the other factor times world size {world_size})",
            path="train_batch_size",
            expected=f"a multiple of {divisor}",
            got=str(batch),
        )
    return batch, micro, steps


def _home(section: OffloadParam | OffloadOptimizer, path: str) -> Offload:
    if section.device == "nvme" and section.nvme_path is None:
        raise ConfigError(
            f'{path}.nvme_path: required when {path}.device is "nvme"',
            path=f"{path}.nvme_path",
            expected="the path of a directory",
        )
    return Offload(section.device, section.nvme_path if section.device == "nvme" else None)


def _configured_home(
    section: OffloadParam | OffloadOptimizer | None, path: str, legacy: bool | None, legacy_path: str
) -> tuple[Offload | None, str]:
    """Return what the config says of one kind of state, `None` where it is silent, and the key that says it."""
    home = None if section is None else _home(section, path)
    if legacy and home is not None and home.kind != "cpu":
        raise ConfigError(f'{legacy_path} = true contradicts {path}.device = "{home.kind}"', path=legacy_path)
    if legacy and home is None:
        return Offload("cpu"), legacy_path
    return home, f"{path}.device"


def _offload(zero: ZeroOptimization | None, shortcuts: Shortcuts) -> tuple[int, Offload, Offload]:
    """Return the stage and the homes of parameters and of optimizer state.

    The stage follows from the shortcuts alone when the config names none.
    """
    base = "zero_optimization"
    silent = ZeroOptimization()
    given = zero or silent
    param, param_key = _configured_home(
        given.offload_param, f"{base}.offload_param", given.cpu_offload_param, f"{base}.cpu_offload_param"
    )
    state, state_key = _configured_home(
        given.offload_optimizer, f"{base}.offload_optimizer", given.cpu_offload, f"{base}.cpu_offload"
    )
    stage = given.stage
    for home, key, least in ((param, param_key, 3), (state, state_key, 1)):
        if home is not None and home.enabled and (stage or 0) < least:
            asked = f"{base}.stage {least}" + ("" if least == 3 else " or more")
            raise ConfigError(
                f"{key} = {show(home.kind)} needs {asked}, got {'none' if stage is None else stage}",
                path=f"{base}.stage",
                expected=str(least),
                got=show(stage),
            )

    def settle(keyword: str, own: Offload | None, key: str, configured: Offload | None, least: int) -> Offload:
        name, wanted = (keyword, own) if own is not None else ("offload", shortcuts.offload)
        if wanted is not None and wanted.enabled and stage is not None and stage < least:
            raise ConfigError(
                f'{name}="{wanted}" needs stage {least}{"" if least == 3 else " or more"} and contradicts '
                f"{base}.stage = {stage} in the config",
                path=f"{base}.stage",
                expected=str(least),
                got=str(stage),
            )
        return agree(name, wanted, key, configured) or Offload()

    home_param = settle("offload_param", shortcuts.offload_param, param_key, param, 3)
    home_state = settle("offload_optimizer", shortcuts.offload_optimizer, state_key, state, 1)
    if stage is None:
        stage = 3 if home_param.enabled or home_state.enabled else 0
    return stage, home_param, home_state


def _compute_norm(zero: ZeroOptimization | None, stage: int, clipping: float | None) -> bool:
    """Whether the norm is told. Leaving it out has DeepSpeed's conditions, so that a config means the same there."""
    if zero is None or zero.compute_grad_norm:
        return True
    key = "zero_optimization.compute_grad_norm"
    if stage not in (1, 2):
        raise ConfigError(f"{key} = false needs zero_optimization.stage 1 or 2, got {stage}", path=key)
    if clipping != 0:
        shown = "1.0, the default" if clipping is None else show(clipping)
        raise ConfigError(f"{key} = false needs gradient_clipping = 0, got {shown}", path=key)
    return False


def _background(document: Document, own: Zeroxide) -> bool:
    writer = document.checkpoint.writer if document.checkpoint is not None else None
    theirs = None if writer is None else writer.decoupled
    if own.checkpoint_background is None:
        return bool(theirs)
    if theirs is not None and theirs is not own.checkpoint_background:
        raise ConfigError(
            f"zeroxide.checkpoint_background = {show(own.checkpoint_background)} contradicts "
            f"checkpoint.writer.decoupled = {show(theirs)}",
            path="zeroxide.checkpoint_background",
        )
    return own.checkpoint_background


def _staging(own: Zeroxide, host_memory: int | None) -> int | None:
    if own.staging_bytes is None:
        return None
    if own.tile_bytes is not None and own.tile_bytes > own.staging_bytes:
        raise ConfigError(
            f"zeroxide.tile_bytes = {own.tile_bytes} is larger than zeroxide.staging_bytes = {own.staging_bytes}, "
            "the ring that has to hold several tiles",
            path="zeroxide.tile_bytes",
        )
    if host_memory is not None and own.staging_bytes >= host_memory:
        raise ConfigError(
            f"zeroxide.staging_bytes = {own.staging_bytes} leaves nothing of host_memory = {host_memory}",
            path="zeroxide.staging_bytes",
        )
    return own.staging_bytes


def _optimizer(
    section: OptimizerSection | None, shortcuts: Shortcuts, origin: str, no_effect: NoEffects
) -> Optimizer | None:
    """Return the optimizer that is asked for. As in DeepSpeed, "Adam" is AdamW unless `adam_w_mode` is false."""
    base = "optimizer.params"
    params = OptimizerParams()
    decoupled = True
    fallback = Optimizer()
    if section is not None:
        kind = section.type.lower()
        if kind not in ("adam", "adamw"):
            raise _unknown_type("optimizer.type", section.type, ("Adam", "AdamW"), _OPTIMIZERS_TO_COME, origin)
        if "max_grad_norm" in section.params:
            raise ConfigError(f'{origin}: unknown key "{base}.max_grad_norm": set "gradient_clipping" instead')
        params = validate(
            OptimizerParams,
            section.params,
            prefix=("optimizer", "params"),
            root=Document,
            origin=origin,
            no_effect=no_effect,
        )
        decoupled = params.adam_w_mode is not False
        if params.torch_adam and decoupled and params.weight_decay is None:
            # The default of torch.optim.AdamW, which torch_adam asks for; that of torch.optim.Adam is 0.
            fallback = Optimizer(weight_decay=0.01)
        if kind == "adamw" and not decoupled:
            raise ConfigError(
                f'{origin}: {base}.adam_w_mode = false contradicts optimizer.type = "{section.type}"; '
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


def _scheduler(section: SchedulerSection | None, origin: str, no_effect: NoEffects) -> Scheduler | None:
    if section is None:
        return None
    model = _SCHEDULES.get(section.type)
    if model is None:
        raise _unknown_type("scheduler.type", section.type, tuple(_SCHEDULES), _SCHEDULES_TO_COME, origin)
    params = validate(
        model, section.params, prefix=("scheduler", "params"), root=Document, origin=origin, no_effect=no_effect
    )
    given = {name: getattr(params, name) for name in model.model_fields if name in params.model_fields_set}
    _check_rates(given.get("warmup_min_lr", 0.0), given.get("warmup_max_lr"), origin)
    written = section.params.get("warmup_type")
    if isinstance(written, str) and written != given.get("warmup_type", written):
        logger.warning(
            'scheduler.params.warmup_type: %s is not "linear", and DeepSpeed, which compares names with their case, '
            'takes what it does not know for "log": so does this run; write "linear" or "log"',
            show(written),
        )
    return Scheduler(section.type, given)  # type: ignore[arg-type]  # the table above holds exactly the three names


def _check_rates(low: float | list[float], high: float | list[float] | None, origin: str) -> None:
    if high is None:
        return
    lows, highs = (each if isinstance(each, list) else [each] for each in (low, high))
    count = max(len(lows), len(highs))
    pairs = zip(lows * (count if len(lows) == 1 else 1), highs * (count if len(highs) == 1 else 1), strict=False)
    if any(below > above for below, above in pairs):
        raise ConfigError(
            f"{origin}: scheduler.params.warmup_min_lr = {low} is above scheduler.params.warmup_max_lr = {high}",
            path="scheduler.params.warmup_min_lr",
        )


def _unknown_type(path: str, name: str, built: tuple[str, ...], to_come: tuple[str, ...], origin: str) -> ConfigError:
    ready = " and ".join((", ".join(built[:-1]), built[-1]))
    if name.lower() in (each.lower() for each in to_come):
        line = f"{path}: {show(name)}: not built yet; {ready} are"
    else:
        close = nearest(name, (*built, *to_come))
        hint = f"; the nearest known name is {show(close)}" if close else ""
        line = f"{path}: expected {ready.replace(' and ', ' or ')}, got {show(name)}{hint}"
    return ConfigError(f"{origin}: {line}", path=path, expected=ready, got=show(name))

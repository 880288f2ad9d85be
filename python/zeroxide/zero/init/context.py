"""`zero.Init`: models built in slices, so that one larger than a rank's memory can be made.

Every parameter is cut into the ranks' slices when its module becomes part of another one, when more than `KEPT_BYTES`
are whole, and at the latest when the context ends. What is done to it inside the context after that still counts: the
parameter is gathered when code touches it, and cut again. So initial values may be set wherever a model sets them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from zeroxide import _core
from zeroxide.config import Config, load
from zeroxide.device.placement import HOST, in_host_memory
from zeroxide.distributed import Ranks, Watch, agree, first_line, init_distributed, start
from zeroxide.errors import ConfigError, RanksError
from zeroxide.params.empty import full_class
from zeroxide.params.handle import shape_of
from zeroxide.params.operations import Need, name_of, need_of, parameters_in
from zeroxide.precision.bits import FLOATS, ORDINARY, why_not_bytes
from zeroxide.zero.init.slices import Slice, SliceFile, slice_of

__all__ = ["Init", "cut_all", "is_building"]

KEPT_BYTES = 64 << 20
"""Bytes of parameters that are whole at once inside the context, beside those of the module being made."""
LARGE_BLOCK = 1 << 20
"""Bytes from which the allocator gives freed memory back to the system."""


class Construction:
    """What one outermost context knows: the parameters that are whole, oldest first.

    Before ranks exchange values each says what it is about to exchange, so that different models are named instead of
    mixed up, and a watch stands over them as it does over training.
    """

    def __init__(self, ranks: Ranks, dtype: torch.dtype | None, file: SliceFile | None) -> None:
        self.ranks = ranks
        self.watch = Watch(ranks)
        self.watch.doing = ("construction", None, None, None)
        self.dtype = dtype
        self.file = file
        self.full: dict[int, tuple[str, nn.Parameter]] = {}
        self.depth = 0
        self.mode = _Touch(self)
        self.hooks: list[Any] = []

    def begin(self) -> None:
        """Starts to listen."""
        # A whole parameter leaves the process when it is cut: on the heap, holes between slices would stay.
        _core.keep_freed_memory(LARGE_BLOCK)
        self.hooks = [
            torch_module.register_module_parameter_registration_hook(self._parameter),
            torch_module.register_module_module_registration_hook(self._module),
        ]
        self.mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self, error: BaseException | None) -> None:
        """Stops to listen and cuts what is left, unless the construction failed: then the model is nobody's."""
        if self.hooks:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for hook in self.hooks:
            hook.remove()
        try:
            if error is None:
                self.cut_all()
                self._meet("the end of the model", ())
        except BaseException as found:
            error = found
            raise
        finally:
            self._dismiss_watch(error)

    def _dismiss_watch(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, RanksError):
            self.watch.failed(f"{type(error).__name__}: {first_line(error)}")
        # With a lost rank this process ends, and the watch sees to it that it does.
        if self.ranks.lost is None or not isinstance(error, RanksError):
            self.watch.close()

    def cut_all(self) -> None:
        """Cuts everything that is whole."""
        self._meet("cutting", self.full.values())
        while self.full:
            self._cut(next(iter(self.full)))

    def add(self, name: str, param: nn.Parameter) -> None:
        """Notes a parameter that shows its values."""
        if in_host_memory(param) and why_not_bytes(param) is None and not is_lazy(param):
            self.full.pop(id(param), None)
            self.full[id(param)] = (name, param)

    def touch(self, param: nn.Parameter, handle: Slice) -> None:
        """Somebody needs the values: gathers them, and cuts what has been whole for longest."""
        with torch._C.DisableTorchFunction():
            self._meet("gathering", [(handle.name, param)])
            handle.gather(param)
            self.full[id(param)] = (handle.name, param)
            self._shrink(id(param))

    def _parameter(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        with torch._C.DisableTorchFunction():
            if param is not None and _cut_already(param) is None:
                self.add(f"{type(module).__name__}.{name}", param)
                self._shrink(id(param))

    def _module(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        with torch._C.DisableTorchFunction():
            for path, param in child.named_parameters(f"{type(parent).__name__}.{name}"):
                if _cut_already(param) is None:
                    self.add(path, param)
            mine = [key for key in (id(param) for param in child.parameters()) if key in self.full]
            for key, shared in zip(mine, self._shared(mine), strict=True):
                if not shared:
                    self._cut(key)

    def _shrink(self, newest: int) -> None:
        sizes = {key: param.nbytes for key, (_, param) in self.full.items()}
        excess = sum(sizes.values()) - sizes.get(newest, 0) - KEPT_BYTES
        for key in list(self.full):
            if excess <= 0:
                return
            if key != newest and not self._shared([key])[0]:
                self._cut(key)
                excess -= sizes[key]

    def _shared(self, keys: list[int]) -> list[bool]:
        """Whether other tensors look at the memory of these parameters: they may yet be written through them.

        Asked of all ranks, since garbage may live longer on one of them.
        """
        found = [_is_shared(self.full[key][1]) for key in keys]
        if not found or self.ranks.alone:
            return found
        self._meet("cutting", [self.full[key] for key in keys])
        rows = self.ranks.gather_rows(torch.tensor(found, dtype=torch.uint8, device=HOST))
        return [bool(value) for value in rows.amax(0).tolist()]

    def _meet(self, what: str, params: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raises RanksError on every rank unless all are about to do the same to parameters of the same shapes."""
        if self.ranks.alone:
            return
        listed = [f"{name} {_dtype(param)} {list(shape_of(param))}" for name, param in params]
        text = " ".join([what, *listed])
        with self.watch.waiting("agreement", text[:100]):
            sums = self.ranks.gather_rows(torch.tensor([zlib.crc32(text.encode())], device=HOST), "building a model")
            if sums.min() != sums.max():
                agree(self.ranks, {"model.what zero.Init comes to": [what, *listed]})

    def _cut(self, key: int) -> None:
        name, param = self.full.pop(key)
        handle = slice_of(param)
        if handle is None:
            handle = Slice(name, param, self.ranks, self._dtype_of(param), self.file)
        if not handle.holds:
            handle.cut(param)

    def _dtype_of(self, param: nn.Parameter) -> torch.dtype:
        """The dtype asked for, where the parameter is one of those numbers; 4-bit weights and their like are not."""
        number = param.dtype in (FLOATS if param.requires_grad else ORDINARY)
        plain = param.requires_grad or full_class(param) is nn.Parameter
        return self.dtype if self.dtype is not None and plain and number else param.dtype


def _dtype(param: nn.Parameter) -> str:
    return str(param.dtype).removeprefix("torch.")


def _cut_already(param: nn.Parameter) -> Slice | None:
    handle = slice_of(param)
    return handle if handle is not None and not handle.full else None


def _is_shared(param: nn.Parameter) -> bool:
    plain = torch.empty(1, device=HOST)
    counts = [torch._C._storage_Use_Count(each.untyped_storage()._cdata) for each in (param, plain)]
    return bool(counts[0] > counts[1])


class _Touch(TorchFunctionMode):
    """Sees every operation inside the context."""

    def __init__(self, construction: Construction) -> None:
        super().__init__()
        self.construction = construction

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        empty = [(each, handle) for each in parameters_in((args, kwargs)) if (handle := _cut_already(each)) is not None]
        if empty:
            name = name_of(func)
            if args and empty[0][0] is args[0] and name in _ANSWERS:
                return _ANSWERS[name](empty[0][1].shape, *args[1:], **kwargs)
            if need_of(func, False) is not Need.NOTHING:
                for param, handle in empty:
                    if not handle.full:
                        self.construction.touch(param, handle)
        return func(*args, **kwargs)


def _size(shape: torch.Size, dim: int | None = None) -> Any:
    return shape if dim is None else shape[dim]


_ANSWERS: dict[str, Callable[..., Any]] = {
    "shape": lambda shape: shape,
    "size": _size,
    "numel": lambda shape: shape.numel(),
    "nelement": lambda shape: shape.numel(),
    "dim": lambda shape: len(shape),
    "ndimension": lambda shape: len(shape),
    "ndim": lambda shape: len(shape),
    "__len__": lambda shape: shape[0],
}


_active: Construction | None = None


def is_building() -> bool:
    """Whether a context is open."""
    return _active is not None


def cut_all() -> None:
    """Cuts whatever is whole in the present context; nothing outside of one."""
    if _active is not None:
        with torch._C.DisableTorchFunction():
            _active.cut_all()


class Init:
    """A context in which modules are built in slices; DeepSpeed's signature. All ranks run the same construction.

    Each rank draws initial values from its own generator; rank 0's count. After the context every parameter shows size
    0, code that changes one needs `GatheredParameters`, and `zeroxide.initialize` takes the model over, a parameter at
    a time. Contexts inside one another are one context, and
    what an exception interrupts is left as it is.

    module: a model that exists already, to be cut at once; the context is then not needed.
    config_dict_or_path, config: only `zero_optimization.offload_param` is read from it, for `remote_device`.
    remote_device: "cpu" or None keep the slices in host memory; "nvme" in an unnamed file in the config's
        `offload_param.nvme_path`, as does a config that offloads parameters to nvme.
    enabled: False makes it do nothing.
    dtype: of the slices. None keeps each parameter's own, and so the initial values exact, whatever the precision of
        the config.
    mem_efficient_linear, pin_memory: no effect: no function of torch is replaced, and memory is pinned by who moves it.

    Raises ConfigError for groups, model parallelism and a swapper, which are not built, and for quantized weights,
    which the config of `initialize` asks for: slices are exact.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: dict[str, Any] | str | Path | None = None,
        config: dict[str, Any] | str | Path | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        refused = {
            "data_parallel_group": data_parallel_group,
            "mpu": mpu,
            "zero_param_parallel_group": zero_param_parallel_group,
            "sequence_data_parallel_group": sequence_data_parallel_group,
            "param_swapper": param_swapper,
        }
        for name, given in refused.items():
            if given is not None:
                raise ConfigError(f"zero.Init: {name} is not built yet: expected {None}", path=name)
        quantised = {
            "zero_quantized_weights": zero_quantized_weights,
            "zero_quantized_nontrainable_weights": zero_quantized_nontrainable_weights,
        }
        for name, wanted in quantised.items():
            if wanted:
                raise ConfigError(
                    f"zero.Init: {name}: slices are exact; set zero_optimization.{name} in the config of "
                    "zeroxide.initialize, by which weights travel",
                    path=name,
                )
        if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"zero.Init: dtype: expected fp32, bf16 or fp16, got {dtype}", path="dtype")
        if remote_device not in (None, "none", "cpu", "nvme"):
            raise ConfigError(
                f'zero.Init: remote_device: expected "cpu" or "nvme", got {remote_device!r}', path="remote_device"
            )
        self.enabled = enabled
        self.dtype = dtype
        self.remote_device = remote_device
        self.chosen = config_dict_or_path if config_dict_or_path is not None else config
        self._entered = False
        if module is not None and enabled:
            construction = self._construction()
            for name, param in module.named_parameters():
                if slice_of(param) is None:
                    construction.add(name, param)
            construction.end(None)

    def _construction(self) -> Construction:
        import torch.distributed as dist

        if not dist.is_initialized():
            # The group belongs to the process, as DeepSpeed's does: the model outlives this context.
            _join()
        ranks = start()
        resolved = None if self.chosen is None else load(self.chosen, world_size=ranks.world)
        if resolved is None or resolved.zeroxide.trim_libraries:
            # Pages that importing has touched would add to the peak of what is built and loaded.
            _core.drop_clean_text()
        return Construction(ranks, self.dtype, self._file(resolved))

    def _file(self, resolved: Config | None) -> SliceFile | None:
        path = None if resolved is None else resolved.zero.offload_param.path
        if self.remote_device in ("none", "cpu") or (self.remote_device is None and path is None):
            return None
        if path is None:
            raise ConfigError(
                'zero.Init: remote_device "nvme" needs a config with zero_optimization.offload_param.nvme_path',
                path="remote_device",
            )
        return SliceFile(path)

    def __enter__(self) -> Init:
        global _active
        if self.enabled:
            if _active is None:
                _active = self._construction()
                _active.begin()
            _active.depth += 1
            self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        if not self._entered or _active is None:
            return
        self._entered = False
        _active.depth -= 1
        if _active.depth == 0:
            ended, _active = _active, None
            ended.end(error)


def _join() -> None:
    import os

    from zeroxide.distributed import read_environment

    if read_environment(os.environ).world > 1:
        init_distributed(verbose=False)

"""AdamW for a plain PyTorch loop, with its state in host memory or on disk."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zeroxide import _core
from zeroxide.config import load, parse_bytes
from zeroxide.errors import ConfigError, ModelError
from zeroxide.optim.groups import core_groups
from zeroxide.zero.plan import DEFAULT_STAGING_BYTES, DEFAULT_TILE_ELEMENTS
from zeroxide.zero.tensors import DTYPE_NAMES, spec

__all__ = ["AdamW"]

_PARTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW computes it.

    Parameters stay ordinary fp32 or bf16 tensors in host memory. The moments, and for bf16 parameters the low half of
    the master weight, are in host memory (`offload="none"` or "cpu") or on disk ("nvme:DIR"); results are the same
    bits in every case. bf16 parameters are updated with an exact fp32 master weight.

    params: parameters or group dicts. lr, betas, eps, weight_decay: as in torch. offload: see above.
    format: "split" or "fp32" for bf16 parameters. host_memory: most bytes of state in memory ("1GiB" or an int).
    threads: compute threads, by default one a CPU.

    Load weights before making the optimizer: with `format="fp32"` it keeps its own master copy of bf16 parameters, and
    does not see what is written into them later.

    Raises ModelError for parameters that are not contiguous fp32 or bf16 in host memory, ConfigError for options,
    BudgetError and StorageError where the state does not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        offload: str = "none",
        format: str = "split",
        host_memory: int | str | None = None,
        threads: int | None = None,
    ) -> None:
        chosen = load(None, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, offload_optimizer=offload)
        if format not in ("split", "fp32"):
            raise ConfigError(f"format {format!r}: expected 'split' or 'fp32'", path="format", got=format)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": True,
            "bias_correction": True,
        }
        self._places: dict[int, tuple[_core.Offload, int]] = {}
        self._cores: list[_core.Offload] = []
        super().__init__(params, defaults)
        home = chosen.offload_optimizer
        limit = None if host_memory is None else parse_bytes(host_memory)
        directories = [home.path] if home.kind == "nvme" and home.path is not None else []
        for dtype in (torch.float32, torch.bfloat16):
            chosen_format = format if dtype is torch.bfloat16 else "fp32"
            self._make_core(dtype, chosen_format, directories, limit, threads or len(os.sched_getaffinity(0)))

    def _make_core(
        self, dtype: torch.dtype, format: str, directories: list[Any], limit: int | None, threads: int
    ) -> None:
        """One core for all parameters of one dtype: one unit a parameter, whose weight is lent for each step."""
        members: list[tuple[torch.Tensor, int]] = []
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                _check(param)
                if param.dtype is dtype and param.requires_grad:
                    members.append((param, number))
        if not members:
            return
        state = "disk" if directories else "host"
        used = sum(core.usage()["total"][0] for core in self._cores)
        core = _core.Offload(
            units=[
                (f"parameter {at}", [(p.numel(), True)], "borrowed", state, False) for at, (p, _) in enumerate(members)
            ],
            limit=None if limit is None else max(0, limit - used),
            threads=threads,
            compute=DTYPE_NAMES[dtype],
            format=format,
            grad=DTYPE_NAMES[dtype],
            tile_elements=DEFAULT_TILE_ELEMENTS,
            staging_bytes=DEFAULT_STAGING_BYTES if directories else 0,
            gathered_bytes=0,
            engine="auto",
            queue_depth=32,
            directories=directories,
            job=f"adamw-{os.getpid()}-{secrets.token_hex(4)}",
        )
        self._cores.append(core)
        # Also at the end of the process, which may come without `close`: scratch files are large.
        weakref.finalize(self, core.close)
        for at, (param, number) in enumerate(members):
            core.fill_begin(at, "weights")
            values = param.detach().to(torch.float32).contiguous().view(-1)
            core.fill_param(at, 0, 0, spec(values))
            core.fill_commit(at)
            core.set_group(at, 0, number)
            self._places[id(param)] = (core, at)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in place. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = core_groups(self.param_groups)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ModelError(f"a gradient of shape {tuple(param.shape)} is sparse: use dense gradients")
                core, at = self._places[id(param)]
                core.lend(at, spec(param.data), spec(param.grad.contiguous()))
        for core in self._cores:
            core.step(groups, 1.0)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed once the state is placed: raises ConfigError after construction."""
        if self._cores:
            raise ConfigError("AdamW cannot take more parameters once its state is placed: make a new optimizer")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: per parameter "step", "exp_avg", "exp_avg_sq" and, for bf16, "master", read into memory."""
        packed = super().state_dict()
        numbers = {}
        for group, plain in zip(self.param_groups, packed["param_groups"], strict=True):
            numbers.update({id(p): number for p, number in zip(group["params"], plain["params"], strict=True)})
        state: dict[int, dict[str, Any]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) not in self._places:
                    continue
                core, at = self._places[id(param)]
                entry: dict[str, Any] = {"step": torch.tensor(float(core.updates(at, 0)))}
                for part in _PARTS:
                    entry[part] = torch.empty(param.shape, dtype=torch.float32)
                    core.read_param(at, 0, part, 0, spec(entry[part].view(-1)))
                if param.dtype is torch.bfloat16:
                    entry["master"] = torch.empty(param.shape, dtype=torch.float32)
                    core.lend(at, spec(param.data), spec(torch.zeros_like(param)))
                    core.read_param(at, 0, "weights", 0, spec(entry["master"].view(-1)))
                    core.clear_gradients()
                state[numbers[id(param)]] = entry
        packed["state"] = state
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` or torch.optim.AdamW gave. bf16 parameters become their "master", rounded."""
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ConfigError("the state dict has other parameter groups than this optimizer")
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key in mine and key != "params"})
            for param, number in zip(mine["params"], theirs["params"], strict=True):
                entry = state_dict["state"].get(number)
                if entry is not None:
                    self._load_one(param, entry)

    def _load_one(self, param: torch.Tensor, entry: dict[str, Any]) -> None:
        core, at = self._places[id(param)]
        core.set_updates(at, 0, int(entry["step"]))
        parts = {part: entry[part] for part in _PARTS}
        if "master" in entry:
            parts["weights"] = entry["master"]
        for part, values in parts.items():
            if values.shape != param.shape:
                raise ConfigError(f"{part} has shape {tuple(values.shape)}, its parameter {tuple(param.shape)}")
            values = values.detach().to(torch.float32).contiguous()
            core.fill_begin(at, part)
            core.fill_param(at, 0, 0, spec(values.view(-1)))
            core.fill_commit(at)
            if part == "weights":
                core.round_bf16(spec(values.view(-1)), spec(param.data))

    def close(self) -> None:
        """Removes the scratch files and gives the memory of the state back. Idempotent."""
        for core in self._cores:
            core.close()


def _check(param: torch.Tensor) -> None:
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"a parameter of shape {tuple(param.shape)} is {param.dtype}: expected fp32 or bf16")
    if param.device.type != "cpu" or not param.is_contiguous():
        raise ModelError(f"a parameter of shape {tuple(param.shape)} is not contiguous in host memory ({param.device})")

"""Ranks that share the sequences of a batch: what an `mpu` says of them, and whether the model makes use of them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from zeroxide.distributed import Job, Ranks
from zeroxide.errors import ConfigError, ModelError, RanksError
from zeroxide.parallel.sequence.exchange import EXCHANGES
from zeroxide.parallel.sequence.parallel_state import SequenceParallelState, initialize_sequence_parallel

__all__ = ["SharedSequences", "sequence_size", "share_sequences"]

_CUTS = (
    "get_model_parallel_world_size",
    "get_tensor_model_parallel_world_size",
    "get_slice_parallel_world_size",
    "get_pipe_parallel_world_size",
    "get_pipeline_model_parallel_world_size",
)
"""What an `mpu` is asked for ranks that have other parts of a model."""


def sequence_size(mpu: Any, mesh_param: Any) -> int | None:
    """How many ranks share the sequences of a batch, as `initialize`'s arguments say; None where they do not.

    mpu: has `get_sequence_parallel_world_size`, as what `UlyssesSPAttentionHF.register_with_transformers` returns.
    mesh_param: (groups of ranks with different samples, ranks that share sequences), as DeepSpeed takes it.

    Raises ConfigError for an `mpu` that cuts the model or does not say, and for a `mesh_param` that is not that.
    """
    if mpu is not None and mesh_param is not None:
        raise ConfigError("mpu and mesh_param both say how ranks are grouped: give one of them", path="mesh_param")
    if mesh_param is not None:
        numbers = list(mesh_param) if isinstance(mesh_param, (tuple, list)) else []
        if len(numbers) != 2 or any(
            isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in numbers
        ):
            raise ConfigError(
                f"mesh_param: expected (data_parallel_size, sequence_parallel_size), got {mesh_param!r}",
                path="mesh_param",
                got=repr(mesh_param),
            )
        if dist.is_initialized() and numbers[0] * numbers[1] != dist.get_world_size():
            raise ConfigError(
                f"mesh_param = {tuple(numbers)} is {numbers[0] * numbers[1]} ranks, and there are "
                f"{dist.get_world_size()}: make their product that",
                path="mesh_param",
                expected=str(dist.get_world_size()),
                got=str(numbers[0] * numbers[1]),
            )
        return int(numbers[1])
    if mpu is None:
        return None
    for name in _CUTS:
        ask = getattr(mpu, name, None)
        if ask is not None and ask() > 1:
            raise ConfigError(
                f"mpu: {name}() is {ask()}: an mpu that cuts the model is not built; say it in zeroxide.mesh",
                path="mpu",
            )
    ask = getattr(mpu, "get_sequence_parallel_world_size", None)
    if ask is None:
        raise ConfigError(
            f"mpu: {type(mpu).__name__} has no get_sequence_parallel_world_size: expected what "
            "UlyssesSPAttentionHF.register_with_transformers or initialize_sequence_parallel returns",
            path="mpu",
        )
    size: int = ask()
    return size


def share_sequences(job: Job, mpu: Any) -> SharedSequences | None:
    """The groups of the mesh's axis `sp`, which are those of the `mpu`; None where nobody shares sequences.

    Called by all ranks. Raises RanksError where the groups that are there are others.
    """
    size = job.mesh.sizes["sp"]
    if size == 1:
        return None
    if mpu is not None:
        mine, theirs = [*job.mesh.group("sp").ranks], dist.get_process_group_ranks(mpu.get_sequence_parallel_group())
        if mine != theirs:
            raise RanksError(
                f"rank {job.world.rank} shares sequences with ranks {theirs} by the mpu, and with {mine} by the mesh: "
                "expected neighbours, in order"
            )
    return SharedSequences(initialize_sequence_parallel(size, mesh=job.mesh), job.parts)


class SharedSequences:
    """Notices a model that trains on parts of sequences as if they were whole."""

    def __init__(self, state: SequenceParallelState, parts: Ranks) -> None:
        self.state = state
        self._parts = parts
        """Those that have the other parts of the model: some may have no attention."""
        self._sure = False

    def check(self, module: nn.Module, before: int) -> None:
        """After a forward with gradients, where `before` exchanges had been made when it began. Raises ModelError."""
        if self._sure or not (module.training and torch.is_grad_enabled()):
            return
        if EXCHANGES.count == before and not self.state.asked:
            self._refuse()
        self._sure = True

    def check_stages(self, before: int) -> None:
        """As `check`, after the stages of a pipeline have trained on a batch. Called by all ranks."""
        if not self._sure:
            if not any(self._parts.gather_objects(EXCHANGES.count > before or self.state.asked)):
                self._refuse()
            self._sure = True

    def _refuse(self) -> NoReturn:
        size = self.state.get_sequence_parallel_world_size()
        raise ModelError(
            f"{size} ranks share the sequences of a batch, and forward has exchanged nothing among them: register "
            "the model with UlyssesSPAttentionHF.register_with_transformers, or use DistributedAttention or "
            "ring_attention in it (zeroxide.parallel.sequence)"
        )

    @property
    def exchanged(self) -> int:
        """Exchanges that have been made."""
        return EXCHANGES.count

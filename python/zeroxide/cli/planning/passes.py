"""What forward and backward of a language model take: rehearsed from shapes, and timed operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zeroxide import _core
from zeroxide.cli.planning.measured import Machine
from zeroxide.cli.quiet import quiet
from zeroxide.cli.training.loss import causal_lm_loss
from zeroxide.cli.training.models import ModelChoice
from zeroxide.device.placement import HOST
from zeroxide.errors import ModelError
from zeroxide.plan.recompute import first_blocks
from zeroxide.profiling.rehearsal import Operation, Pass, Rehearsal, rehearse
from zeroxide.profiling.replay import replay
from zeroxide.zero.activations_on_disk import MIN_BYTES
from zeroxide.zero.recompute import recompute as recompute_blocks

__all__ = ["PassSeconds", "meta_model", "missing", "pass_seconds", "rehearse_training", "time_operations"]

LARGEST = 256 << 20
"""Bytes of an operation's tensors up to which it is run again; those of larger ones follow from the rates."""
LARGEST_FLOPS = 4 * 10**11
_ELEMENTS = 4 << 20
"""Of the operations whose rates stand for those that cannot be run again."""


def meta_model(choice: ModelChoice, dtype: torch.dtype) -> Any:
    """The model on the meta device, its buffers among it. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    choice.own_config(), dtype=dtype, trust_remote_code=False
                )
        # What a config says goes into transformers' arithmetic, where anything may come of it.
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ModelError(f"{choice.name} cannot be built as a language model: {line[:200]}") from None


def rehearse_training(
    choice: ModelChoice,
    dtype: torch.dtype,
    batch: int,
    sequence: int,
    *,
    checkpointing: bool,
    stowed: bool = False,
    recompute: int = 0,
) -> Rehearsal:
    """A micro-batch as `zeroxide train` computes it, of int64 tokens of shape (batch, sequence).

    checkpointing: the model computes its activations again. recompute: the engine does, those of so many of its first
    blocks. stowed: activations wait for backward on disk. Raises ModelError where the model has no activation
    checkpointing, or does what shapes alone cannot answer.
    """
    model = meta_model(choice, dtype)
    model.loss_function = causal_lm_loss
    if checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ModelError(f"{choice.name} does not support activation checkpointing")
        # The method was renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    recompute_blocks(first_blocks(model, recompute).modules, has_values=False)
    tokens = torch.zeros((batch, sequence), dtype=torch.int64, device=HOST)

    def loss() -> torch.Tensor:
        result: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return result

    with quiet():
        try:
            return rehearse(model, loss, MIN_BYTES if stowed else None)
        # The model's own code runs, and may ask anything of its tensors.
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ModelError(f"{choice.name} cannot be rehearsed without values: {line[:200]}") from None


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a micro-batch's forward and backward on one process that has the processor to itself."""

    forward: float
    backward: float


def pass_seconds(machine: Machine, rehearsal: Rehearsal, fresh_from: int | None = None) -> PassSeconds:
    """What the operations take by themselves, and what comes with each. A model that runs operations one by one.

    fresh_from: bytes from which a block of memory is the system's anew each time; None where freed memory is reused.
    """
    return PassSeconds(*(_seconds(machine, each, fresh_from) for each in (rehearsal.forward, rehearsal.backward)))


def _seconds(machine: Machine, work: Pass, fresh_from: int | None) -> float:
    fresh = 0 if fresh_from is None else work.made_from(fresh_from)
    return fresh * machine.fresh_seconds + sum(count * _one(machine, each) for each, count in work.operations.items())


def _one(machine: Machine, operation: Operation) -> float:
    if not operation.nbytes:
        return machine.operation_seconds
    measured = machine.operations.get(operation.key)
    if measured is None:
        of_bytes = operation.nbytes / machine.bytes_per_second
        measured = max(of_bytes, operation.flops / machine.flops)
    return measured + machine.operation_seconds


def missing(machine: Machine, rehearsals: list[Rehearsal]) -> list[Operation]:
    """The operations that can be run again here and were not yet."""
    found: dict[str, Operation] = {}
    for rehearsal in rehearsals:
        for work in (rehearsal.forward, rehearsal.backward):
            for each in work.operations:
                small = each.nbytes <= LARGEST and each.flops <= LARGEST_FLOPS
                if each.nbytes and small and each.key not in machine.operations:
                    found[each.key] = each
    return list(found.values())


def time_operations(machine: Machine, operations: list[Operation], threads: int, say: Callable[[str], None]) -> None:
    """Runs each again and keeps its time in `machine`; the rates of what cannot be run again as well."""
    torch.set_num_threads(threads)
    # As an engine has it: memory that was freed is used again.
    _core.keep_freed_memory()
    if not machine.flops:
        machine.flops, machine.bytes_per_second = _matrix_rate(), _element_rate()
    if len(operations) > 1:
        say(f"timing {len(operations)} operations of the model at its shapes")
    for each in operations:
        # What zeros cannot stand in for counts by its bytes.
        try:
            machine.operations[each.key] = replay(each)
        except (RuntimeError, IndexError, ValueError):
            continue


def _matrix_rate() -> float:
    """FLOP a second of a product in bf16."""
    first, second = (torch.full((1024, 1024), 0.01, dtype=torch.bfloat16, device=HOST) for _ in range(2))
    name = "aten.mm.default"
    found = Operation(name, name, torch.ops.aten.mm.default, (first, second), {}, nbytes=3 << 21)
    return float(2 * 1024**3 / replay(found))


def _element_rate() -> float:
    """Bytes a second, read and written, of an addition in bf16."""
    first, second = (torch.full((_ELEMENTS,), 0.01, dtype=torch.bfloat16, device=HOST) for _ in range(2))
    name = "aten.add.Tensor"
    nbytes = 6 * _ELEMENTS
    return nbytes / replay(Operation(name, name, torch.ops.aten.add.Tensor, (first, second), {}, nbytes=nbytes))

"""What a commit notes beside the bytes of its tiles: all of a run that is not in the core."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.checkpoint.contents import param_records, persistent_buffers
from zeroxide.checkpoint.format import generators
from zeroxide.checkpoint.format.json_codec import decode
from zeroxide.checkpoint.save.description import frame
from zeroxide.device.placement import in_host, of_buffer
from zeroxide.errors import CheckpointError
from zeroxide.optim.groups import assign
from zeroxide.optim.rules import FIXED
from zeroxide.precision.bits import bytes_of, tensor_of, why_not_bytes
from zeroxide.zero.buffers import set_buffer

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["client_state_of", "restore", "step_of", "words"]


def words(training: TrainingState, client_state: dict[str, Any]) -> str:
    """The note: JSON. Raises CheckpointError for what JSON cannot hold."""
    said = frame(training, client_state)
    plain = {key: each.model_dump() if hasattr(each, "model_dump") else each for key, each in said.items()}
    plain["groups"] = [group.model_dump() for group in said["groups"]]
    plain["generators"] = generators.read()
    plain["updates"] = [training.core.updates(held.unit, held.position) for held in param_records(training)]
    plain["buffers"] = {name: _text(name, each) for name, each in persistent_buffers(training.module).items()}
    return json.dumps(plain)


def step_of(note: str) -> int:
    """Optimizer steps that the run had made."""
    return int(json.loads(note)["counters"]["global_steps"])


def client_state_of(note: str) -> dict[str, Any]:
    """What the caller had in `client_state`."""
    found: dict[str, Any] = decode(json.loads(note)["client_state"])
    return found


def restore(training: TrainingState, note: str) -> None:
    """Makes everything outside of the core what the note says; the random number generators last."""
    said = json.loads(note)
    for held, updates in zip(param_records(training), said["updates"], strict=True):
        training.core.set_updates(held.unit, held.position, updates)
    for name, buffer in persistent_buffers(training.module).items():
        if buffer.numel():
            raw = of_buffer(bytearray(base64.b64decode(said["buffers"][name])), torch.uint8)
            set_buffer(training.module, buffer, tensor_of(raw, buffer.dtype, buffer.shape))
    scheduler = training.lr_scheduler
    if scheduler is not None:
        scheduler.load_state_dict(decode(said["scheduler"]["state"]))
    for group, saved in zip(training.optimizer.param_groups, said["groups"], strict=True):
        for name, value in decode(saved["hyperparameters"]).items():
            if name not in FIXED:
                assign(group, name, value)
    if said["loss_scale"] is not None:
        training.loss_scaler.load_state_dict(said["loss_scale"])
    counters = said["counters"]
    training.resume(
        global_steps=counters["global_steps"],
        skipped_steps=counters["skipped_steps"],
        micro_steps=counters["micro_steps"],
        samples=counters["global_samples"],
    )
    generators.restore(said["generators"])
    training.align_random()


def check(training: TrainingState, note: str) -> None:
    """Raises CheckpointError where the note is of another kind of run than this one. Changes nothing."""
    said = json.loads(note)
    here = None if training.lr_scheduler is None else type(training.lr_scheduler).__name__
    there = None if said["scheduler"] is None else said["scheduler"]["kind"]
    _same("the lr_scheduler", there, here)
    _same("the number of optimizer groups", len(said["groups"]), len(training.optimizer.param_groups))
    _same("the buffers", sorted(said["buffers"]), sorted(persistent_buffers(training.module)))
    for name, buffer in persistent_buffers(training.module).items():
        _same(f"the bytes of buffer {name}", len(base64.b64decode(said["buffers"][name])), buffer.nbytes)


def _same(what: str, there: object, here: object) -> None:
    if there != here:
        raise CheckpointError(
            f"the run cannot go on: {what} was {there!r} when it was committed and is {here!r} now; go on with the "
            "script and config that it had, or start anew with another zeroxide.durable_name"
        )


def _text(name: str, buffer: torch.Tensor) -> str:
    problem = why_not_bytes(buffer)
    if problem is not None:
        raise CheckpointError(f"buffer {name} {problem}, which no commit can hold: register it with persistent=False")
    return base64.b64encode(bytes_of(in_host(buffer.detach()).contiguous()).numpy().tobytes()).decode()

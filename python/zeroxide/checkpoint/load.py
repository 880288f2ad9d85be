"""Loading: everything is compared and verified first, and only then does the engine change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.checkpoint import generators
from zeroxide.checkpoint.commit import find
from zeroxide.checkpoint.contents import PARTS, Held, LiveState, Staging, held_parameters, persistent_buffers
from zeroxide.checkpoint.keeping import Keeping
from zeroxide.checkpoint.manifest import Manifest, Piece, SavedBuffer, SavedParameter, read_manifest
from zeroxide.checkpoint.match import match_buffers, match_groups, match_parameters
from zeroxide.checkpoint.plain import decode
from zeroxide.checkpoint.source import Sources
from zeroxide.errors import CheckpointError
from zeroxide.zero.state import Home
from zeroxide.zero.tensors import spec

if TYPE_CHECKING:
    from zeroxide.engine import Engine

__all__ = ["load_checkpoint"]

SCHEDULED = ("lr", "initial_lr")
"""Hyperparameters that belong to the schedule where there is one."""


def load_checkpoint(
    engine: Engine, load_dir: Path, tag: str | None, *, strict: bool, optimizer: bool, scheduler: bool
) -> tuple[Path, dict[str, Any]]:
    """Loads weights and buffers and, as asked, optimizer state and schedule. Returns (path, client_state).

    With `optimizer` or `scheduler`, training goes on where it was: counters and the states of torch's, Python's and
    numpy's global random number generators are restored as well. A parameter that was frozen when it was saved and is
    trainable now starts with zero moments; one that was left out of the checkpoint keeps its values.

    Raises CheckpointError, before the engine has changed, for a checkpoint that is missing, damaged or of another
    model; an error after that says that the engine holds a mixture.
    """
    path = find(load_dir, None if tag is None else str(tag))
    load = _Load(engine, path, read_manifest(path), strict=strict, optimizer=optimizer, scheduler=scheduler)
    load.apply()
    return path, load.client_state


@dataclass(frozen=True)
class _Fill:
    """One part of one unit that will be filled: where each parameter's values come from, in the core's order."""

    unit: int
    part: str
    sources: list[tuple[Held, list[Piece] | None]]
    """Pieces to read; an empty list means zeros, None the values that are there now."""

    @property
    def kept(self) -> list[Held]:
        return [held for held, pieces in self.sources if pieces is None]


class _Load:
    """One load. Making it compares and verifies, and changes nothing."""

    def __init__(
        self, engine: Engine, path: Path, manifest: Manifest, *, strict: bool, optimizer: bool, scheduler: bool
    ) -> None:
        self.engine = engine
        self.core = engine._alive()
        self.path = path
        self.manifest = manifest
        self.held = held_parameters(engine)
        self.saved = match_parameters(self.held, manifest, path, strict=strict)
        self.buffers = match_buffers(persistent_buffers(engine.module), manifest, path, strict=strict)
        self.resume = optimizer or scheduler
        self.optimizer = optimizer
        self.scheduler = scheduler and self._has_scheduler(strict)
        if self.resume:
            match_groups(self.held, self.saved, len(engine.optimizer.param_groups), manifest, path)
        try:
            self.client_state: dict[str, Any] = decode(manifest.client_state)
            self.groups: list[dict[str, Any]] = [decode(group.hyperparameters) for group in manifest.groups]
            self.schedule = decode(manifest.scheduler.state) if manifest.scheduler is not None else None
            if not isinstance(self.client_state, dict):
                raise TypeError("client_state is no dict")
            if not all(isinstance(group, dict) for group in self.groups):
                raise TypeError("an optimizer group is no dict")
            if self.resume:
                generators.check(manifest.generators)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the manifest of {path} is not well-formed: {error}", path=path) from None
        self.fills = list(self._plan(PARTS if optimizer else PARTS[:1]))
        self.staging = Staging()
        needed = [piece for fill in self.fills for _, pieces in fill.sources for piece in pieces or ()]
        needed += [piece for _, saved in self.buffers for piece in saved.pieces]
        self.sources = Sources(path, manifest.files, needed, self.staging)

    def _has_scheduler(self, strict: bool) -> bool:
        here, there = self.engine.lr_scheduler, self.manifest.scheduler
        if here is not None and there is not None:
            kind = type(here).__name__
            if kind != there.kind:
                raise CheckpointError(
                    f"{self.path} was saved with the lr_scheduler {there.kind}, this engine has {kind}: pass "
                    "load_lr_scheduler_states=False to start the new one",
                    path=self.path,
                )
            return True
        if strict and (here is not None or there is not None):
            which = "no lr_scheduler, this engine has one" if there is None else "an lr_scheduler, this engine has none"
            raise CheckpointError(
                f"{self.path} was saved with {which}: pass load_lr_scheduler_states=False to go on without it",
                path=self.path,
            )
        return False

    def _plan(self, parts: tuple[str, ...]) -> Iterator[_Fill]:
        by_unit: dict[int, list[Held]] = {}
        for held in self.held:
            by_unit.setdefault(held.unit, []).append(held)
        for unit, members in by_unit.items():
            for part in parts:
                sources = [
                    (held, self._source(self.saved[held.name], part))
                    for held in members
                    if held.trainable or part == "weights"
                ]
                if any(pieces is not None for _, pieces in sources):
                    yield _Fill(unit, part, sources)

    @staticmethod
    def _source(saved: SavedParameter | None, part: str) -> list[Piece] | None:
        if saved is None:
            return None
        pieces = saved.part(part)
        # Weights that were left out stay; moments that never were are zero.
        return pieces if pieces or part != "weights" else None

    def apply(self) -> None:
        """Changes the engine. Raises CheckpointError that says whether it is as before or a mixture."""
        live = LiveState(self.core, self.engine._plan.tile_elements, self.staging)
        room: dict[int, int] = {}
        for fill in self.fills:
            room[fill.unit] = room.get(fill.unit, 0) + sum(held.numel for held in fill.kept)
        try:
            keeping = Keeping(max(room.values(), default=0), self._scratch(), live, self.staging)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} was not loaded: no room for the values that stay: {error.strerror}", path=self.path
            ) from None
        with keeping:
            undo = self._resume_schedule()
            done = 0
            try:
                self.engine._gatherer.release_all()
                self.core.clear_gradients()
                for fill in self.fills:
                    if not done or self.fills[done - 1].unit != fill.unit:
                        self._keep_unit(fill.unit, keeping)
                    self._fill(fill, keeping)
                    done += 1
                for buffer, saved in self.buffers:
                    self._fill_buffer(buffer, saved)
            except BaseException as error:
                undo()
                line = (
                    f"loading {self.path} stopped in the middle ({error}): the engine now holds a mixture of old and "
                    "loaded state; load a checkpoint before training on"
                )
                if isinstance(error, Exception):
                    raise CheckpointError(line, path=self.path) from error
                error.add_note(line)
                raise
        self._resume_counters()

    def _scratch(self) -> Path | None:
        config = self.engine.config
        homes = ((self.engine._plan.weights, config.offload_param), (self.engine._plan.state, config.offload_optimizer))
        return next((offload.path for home, offload in homes if home is Home.DISK), None)

    def _keep_unit(self, unit: int, keeping: Keeping) -> None:
        keeping.start_unit()
        for fill in self.fills:
            if fill.unit == unit:
                for held in fill.kept:
                    keeping.keep(held, fill.part)

    def _fill(self, fill: _Fill, keeping: Keeping) -> None:
        self.core.fill_begin(fill.unit, fill.part)
        try:
            for held, pieces in fill.sources:
                for start, values in self._values(held, fill.part, pieces, keeping):
                    self.core.fill_param(fill.unit, held.position, start, spec(values))
        finally:
            # Also after an error: a fill that stays open would refuse the next load.
            self.core.fill_commit(fill.unit)

    def _values(
        self, held: Held, part: str, pieces: list[Piece] | None, keeping: Keeping
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, fp32 values) of a parameter's part."""
        if pieces is None:
            yield from keeping.chunks(held, part)
        elif not pieces:
            zeros = self.staging.values[: min(held.numel, self.staging.elements)].zero_()
            for start in range(0, held.numel, self.staging.elements):
                yield start, zeros[: held.numel - start]
        else:
            for start, stored in self.sources.chunks(pieces):
                if stored.dtype == torch.float32:
                    yield start, stored
                else:
                    yield start, self.staging.values[: stored.numel()].copy_(stored)

    @torch.no_grad()
    def _fill_buffer(self, buffer: torch.Tensor, saved: SavedBuffer) -> None:
        flat = buffer.view(-1) if buffer.is_contiguous() else torch.empty(buffer.numel(), dtype=buffer.dtype)
        for start, values in self.sources.chunks(saved.pieces):
            flat[start : start + values.numel()].copy_(values)
        if not buffer.is_contiguous():
            buffer.copy_(flat.view(buffer.shape))

    def _resume_schedule(self) -> Callable[[], None]:
        """Restores schedule and hyperparameters. Returns what undoes it; undone already if it raises."""
        groups = self.engine.optimizer.param_groups
        before = [dict(group) for group in groups]
        scheduler = self.engine.lr_scheduler if self.scheduler else None
        position = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

        def undo() -> None:
            if scheduler is not None:
                scheduler.load_state_dict(position)
            for group, values in zip(groups, before, strict=True):
                group.clear()
                group.update(values)

        keep = SCHEDULED if self.engine.lr_scheduler is not None and not self.scheduler else ()
        try:
            if scheduler is not None:
                scheduler.load_state_dict(self.schedule)
            for group, values in zip(groups, self.groups, strict=False):
                names = values if self.optimizer else (SCHEDULED if self.scheduler else ())
                group.update({name: values[name] for name in names if name in values and name not in keep})
        except Exception as error:
            undo()
            raise CheckpointError(
                f"{self.path} was not loaded: the lr_scheduler refused its state ({type(error).__name__}: {error})",
                path=self.path,
            ) from error
        return undo

    def _resume_counters(self) -> None:
        engine, saved = self.engine, self.manifest.counters
        if self.optimizer:
            for held in self.held:
                was = self.saved[held.name]
                if was is not None:
                    self.core.set_updates(held.unit, held.position, was.updates)
            if self.manifest.loss_scale is not None:
                engine._scaler.load_state_dict(self.manifest.loss_scale.model_dump())
        if not self.resume:
            return
        engine.global_steps = saved.global_steps
        engine.global_samples = saved.global_samples
        engine.skipped_steps = saved.skipped_steps
        # A checkpoint is always between two steps, whatever their number of micro-batches is now.
        steps = engine.gradient_accumulation_steps()
        engine.micro_steps = (
            saved.micro_steps if engine._boundary is not None else -(-saved.micro_steps // steps) * steps
        )
        generators.restore(self.manifest.generators)

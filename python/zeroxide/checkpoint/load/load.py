"""Loading: everything is compared and verified first, on all ranks, and only then does any engine change.

Whatever world, stage or offload mode saved, a rank reads the ranges of elements that it holds, wherever they lie.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroxide.checkpoint.agree import Team
from zeroxide.checkpoint.contents import (
    WEIGHTS,
    ElementRange,
    param_records,
    persistent_buffers,
    pieces_to_fill,
    state_names,
    value_dtype,
)
from zeroxide.checkpoint.format import generators
from zeroxide.checkpoint.format.commit import find, holds_nothing
from zeroxide.checkpoint.format.json_codec import decode
from zeroxide.checkpoint.format.manifest import Manifest, Piece, SavedBuffer, SavedParameter, read_manifest
from zeroxide.checkpoint.live_state import LiveState, Staging
from zeroxide.checkpoint.load.match import match_buffers, match_groups, match_parameters, match_rules
from zeroxide.checkpoint.load.source import Sources
from zeroxide.checkpoint.load.spill_file import SpillFile
from zeroxide.device.placement import HOST, spec
from zeroxide.errors import CheckpointError
from zeroxide.optim.groups import assign
from zeroxide.optim.rules import FIXED
from zeroxide.precision.bits import bytes_of, converted, tensor_of
from zeroxide.zero.buffers import set_buffer

if TYPE_CHECKING:
    from zeroxide.engine.training_state import TrainingState

__all__ = ["load_checkpoint"]

logger = logging.getLogger("zeroxide")

SCHEDULED = ("lr", "initial_lr")
"""Hyperparameters that belong to the schedule where there is one."""


def load_checkpoint(
    training: TrainingState, load_dir: Path, tag: str | None, *, strict: bool, optimizer: bool, scheduler: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """Loads weights and buffers and, as asked, optimizer state and schedule. Returns (path, client_state).

    (None, None), with a warning, where `tag` is None and nothing was saved to `load_dir`.

    Every rank must call it with the same arguments. With `optimizer` or `scheduler`, training goes on where it was:
    counters, loss scale and the states of torch's, Python's and numpy's global random number generators are restored
    as well, those of each rank; a rank that the saved run did not have keeps its generators as they are. A parameter
    that was frozen when it was saved and is trainable now starts with fresh optimizer state; one that was left out of
    the checkpoint keeps its values.

    Raises CheckpointError on all ranks, before any engine has changed, for a checkpoint that is missing, damaged or
    of another model; an error after that says that the engines hold a mixture.
    """
    team = Team(training.world)
    asked = {"load_optimizer_states": optimizer, "load_lr_scheduler_states": scheduler, "load_module_strict": strict}

    def look() -> dict[str, Any]:
        # One rank follows `latest`, since a save of somebody else may move it on meanwhile.
        if tag is None and team.leads and holds_nothing(load_dir):
            return {"name": None, "asked": asked, "nothing": True}
        found = find(load_dir, None if tag is None else str(tag)) if team.leads or tag is not None else None
        return {"name": None if found is None else found.name, "asked": asked}

    looked = team.together(look, load_dir)
    if looked[0].get("nothing"):
        if team.leads:
            logger.warning("no checkpoint was loaded: nothing was saved to %s", load_dir)
        return None, None
    path = load_dir / looked[0]["name"]
    manifests: list[Manifest] = []

    def read() -> dict[str, Any]:
        manifests.append(read_manifest(path))
        return {"tag": looked[team.rank]["name"] or path.name, "manifest": manifests[0].checksum(), **asked}

    team.same(team.together(read, path), "load different checkpoints", path)
    load = _Load(training, path, manifests[0], team, strict=strict, optimizer=optimizer, scheduler=scheduler)
    try:
        load.apply()
    finally:
        load.sources.close()
    return path, load.client_state


@dataclass(frozen=True)
class _Fill:
    """One part of one unit that will be filled: where the values of each run come from, in the core's order."""

    unit: int
    part: str
    sources: list[tuple[ElementRange, list[Piece] | None]]
    """Pieces to read from; an empty list means initial values, None the values that are there now."""

    @property
    def kept(self) -> list[ElementRange]:
        return [run for run, pieces in self.sources if pieces is None]


class _Load:
    """One load. Making it compares and verifies, and changes nothing."""

    def __init__(
        self,
        training: TrainingState,
        path: Path,
        manifest: Manifest,
        team: Team,
        *,
        strict: bool,
        optimizer: bool,
        scheduler: bool,
    ) -> None:
        self.training = training
        self.core = training.core
        self.path = path
        self.manifest = manifest
        self.team = team
        self.held = param_records(training)
        self.elsewhere = self._elsewhere() if training.in_parts else frozenset()
        self.resume = optimizer or scheduler
        self.optimizer = optimizer
        self.staging = Staging()
        team.together(lambda: self._compare(strict, scheduler), path)
        parts = [WEIGHTS, *(state_names(self.held) if optimizer else ())]
        self.fills = list(self._plan(parts))
        needed = [
            piece
            for held in self.held
            if (saved := self.saved[held.name]) is not None
            for part in parts
            if held.has(part)
            for piece in saved.part(part)
        ]
        if any(unit.experts for unit in training.units):
            # What other ranks have, too: all verify their share of the same files.
            needed = [piece for saved in manifest.parameters for part in parts for piece in saved.part(part)]
        needed += [piece for _, saved in self.buffers for piece in saved.pieces]
        # Ranks that have one part of the model need the same of the files.
        self.sources = Sources(path, manifest.files, needed, self.staging, team, Team(training.ranks))

    def _elsewhere(self) -> frozenset[str]:
        """Names of all parameters and buffers that the parts of the model have, this one among them."""

        def mine() -> list[str]:
            names = [name for held in self.held for name in held.names]
            return [*names, *persistent_buffers(self.training.module)]

        return frozenset(name for names in self.team.together(mine, self.path) for name in names)

    def _compare(self, strict: bool, scheduler: bool) -> None:
        training, manifest, path = self.training, self.manifest, self.path
        self.saved = match_parameters(self.held, manifest, path, strict=strict, elsewhere=self.elsewhere)
        self.buffers = match_buffers(
            persistent_buffers(training.module), manifest, path, strict=strict, elsewhere=self.elsewhere
        )
        self.scheduler = scheduler and self._has_scheduler(strict)
        if self.resume:
            match_groups(self.held, self.saved, len(training.optimizer.param_groups), manifest, path)
            if self.optimizer:
                match_rules(training.optimizer.hyperparameters(), manifest, path)
        states = manifest.generators
        self.generators = states[self.team.rank] if self.resume and self.team.rank < len(states) else None
        try:
            self.client_state: dict[str, Any] = decode(manifest.client_state)
            self.groups: list[dict[str, Any]] = [decode(group.hyperparameters) for group in manifest.groups]
            self.schedule = decode(manifest.scheduler.state) if manifest.scheduler is not None else None
            if not isinstance(self.client_state, dict):
                raise TypeError("client_state is no dict")
            if not all(isinstance(group, dict) for group in self.groups):
                raise TypeError("an optimizer group is no dict")
            if self.generators is not None:
                generators.check(self.generators)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the manifest of {path} is not well-formed: {error}", path=path) from None

    def _has_scheduler(self, strict: bool) -> bool:
        here, there = self.training.lr_scheduler, self.manifest.scheduler
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

    def _plan(self, parts: list[str]) -> Iterator[_Fill]:
        # A unit is filled on all ranks or on none, also where a rank holds nothing of it.
        units = list(dict.fromkeys(held.unit for held in self.held))
        mine: dict[tuple[int, str], list[ElementRange]] = {}
        for part in parts:
            for run in pieces_to_fill(self.training, self.held, part):
                mine.setdefault((run.held.unit, part), []).append(run)
        for unit in units:
            for part in parts:
                if not self._is_saved(unit, part):
                    continue
                yield _Fill(
                    unit,
                    part,
                    [
                        (run, self._source(self.saved[run.held.name], part))
                        for run in mine.get((unit, part), ())
                        if run.count and run.held.has(part)
                    ],
                )

    def _is_saved(self, unit: int, part: str) -> bool:
        """Whether the checkpoint has or implies values for anything in this part of a unit."""
        return any(
            self._source(self.saved[held.name], part) is not None
            for held in self.held
            if held.unit == unit and held.has(part)
        )

    @staticmethod
    def _source(saved: SavedParameter | None, part: str) -> list[Piece] | None:
        if saved is None:
            return None
        pieces = saved.part(part)
        # Weights that were left out stay; state that never was is what it starts from.
        return pieces if pieces or part != WEIGHTS else None

    def apply(self) -> None:
        """Changes the engine. Raises CheckpointError that says whether it is as before or a mixture."""
        live = LiveState(self.training, self.staging)
        with self._make_room(live) as spill:
            undo = self._resume_schedule()
            try:
                self.team.together(lambda: self._change(spill), self.path)
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

    def _make_room(self, live: LiveState) -> SpillFile:
        room: dict[int, int] = {}
        for fill in self.fills:
            kept = sum(run.count * value_dtype(run.held, fill.part).itemsize for run in fill.kept)
            room[fill.unit] = room.get(fill.unit, 0) + kept
        made: list[SpillFile] = []

        def make() -> None:
            try:
                made.append(
                    SpillFile(max(room.values(), default=0), self.training.scratch_directory, live, self.staging)
                )
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} was not loaded: no room for the values that stay: {error.strerror}", path=self.path
                ) from None

        try:
            self.team.together(make, self.path)
        except BaseException:
            for spill in made:
                spill.close()
            raise
        return made[0]

    def _change(self, spill: SpillFile) -> None:
        """Fills everything. A failure leaves nothing half begun, and the other ranks none to wait for."""
        self.training.release_all()
        self.training.forget_residuals()
        self.core.clear_gradients()
        left = list(reversed(self.fills))
        unit = None
        try:
            while left:
                if left[-1].unit != unit:
                    unit = left[-1].unit
                    self._keep_unit(unit, spill)
                self._fill(left.pop(), spill)
            for buffer, saved in self.buffers:
                self._fill_buffer(buffer, saved)
        except BaseException:
            # The others go on, and every fill is an act of all ranks.
            for fill in reversed(left) if self.training.ranks.world > 1 else ():
                self.core.fill_begin(fill.unit, fill.part)
                self.core.fill_commit(fill.unit)
            raise

    def _keep_unit(self, unit: int, spill: SpillFile) -> None:
        spill.start_unit()
        for fill in self.fills:
            if fill.unit == unit:
                for run in fill.kept:
                    spill.keep(run, fill.part)

    def _fill(self, fill: _Fill, spill: SpillFile) -> None:
        self.core.fill_begin(fill.unit, fill.part)
        try:
            for run, pieces in fill.sources:
                for start, values in self._values(run, fill.part, pieces, spill):
                    place = (fill.unit, run.held.position)
                    if run.held.trainable:
                        self.core.fill_param(*place, start, spec(values))
                    else:
                        self.core.fill_bytes(*place, start * values.itemsize, spec(values.view(torch.uint8)))
        finally:
            # Also after an error: a fill that stays open would refuse the next load.
            self.core.fill_commit(fill.unit)

    def _values(
        self, run: ElementRange, part: str, pieces: list[Piece] | None, spill: SpillFile
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, values) of one part of a run: fp32, of a frozen weight in its own dtype."""
        if pieces is None:
            yield from spill.chunks(run, part)
        elif not pieces:
            initial = self.staging.values[: min(run.count, self.staging.elements)].fill_(run.held.states[part])
            for start in range(0, run.count, self.staging.elements):
                yield run.start + start, initial[: run.count - start]
        else:
            held, first = run.held, run.held.first
            chunks = self.sources.chunks(pieces, first + run.start, run.count, held.full_shape, held.region)
            for at, stored in chunks:
                dtype, start = value_dtype(held, part), at - first
                if stored.dtype == dtype:
                    yield start, stored
                elif dtype == torch.float32:
                    yield start, self.staging.values[: stored.numel()].copy_(stored)
                else:
                    yield start, converted(stored, dtype)

    @torch.no_grad()
    def _fill_buffer(self, buffer: torch.Tensor, saved: SavedBuffer) -> None:
        raw = torch.empty(buffer.numel() * buffer.itemsize, dtype=torch.uint8, device=HOST)
        for start, values in self.sources.chunks(saved.pieces, 0, buffer.numel(), saved.shape):
            found = values if values.dtype == buffer.dtype else values.to(buffer.dtype)
            at = start * buffer.itemsize
            raw[at : at + found.numel() * buffer.itemsize].copy_(bytes_of(found))
        set_buffer(self.training.module, buffer, tensor_of(raw, buffer.dtype, buffer.shape))

    def _resume_schedule(self) -> Callable[[], None]:
        """Restores schedule and hyperparameters. Returns what undoes it; undone already if it raises."""
        groups = self.training.optimizer.param_groups
        before = [copy.deepcopy({name: value for name, value in group.items() if name != "params"}) for group in groups]
        scheduler = self.training.lr_scheduler if self.scheduler else None
        position = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

        def undo() -> None:
            if scheduler is not None:
                scheduler.load_state_dict(position)
            for group, values in zip(groups, before, strict=True):
                for name in set(group) - set(values) - {"params"}:
                    del group[name]
                for name, value in values.items():
                    assign(group, name, value)

        keep = SCHEDULED if self.training.lr_scheduler is not None and not self.scheduler else ()

        def resume() -> None:
            try:
                if scheduler is not None:
                    scheduler.load_state_dict(self.schedule)
                for group, values in zip(groups, self.groups, strict=False):
                    names = values if self.optimizer else (SCHEDULED if self.scheduler else ())
                    for name in names:
                        if name in values and name not in (*keep, *FIXED):
                            assign(group, name, values[name])
            except Exception as error:
                raise CheckpointError(
                    f"{self.path} was not loaded: the lr_scheduler refused its state ({type(error).__name__}: {error})",
                    path=self.path,
                ) from error

        try:
            self.team.together(resume, self.path)
        except BaseException:
            undo()
            raise
        return undo

    def _resume_counters(self) -> None:
        training, saved = self.training, self.manifest.counters
        if self.optimizer:
            for held in self.held:
                was = self.saved[held.name]
                if was is not None:
                    self.core.set_updates(held.unit, held.position, was.updates)
            if self.manifest.loss_scale is not None:
                training.loss_scaler.load_state_dict(self.manifest.loss_scale.model_dump())
        if not self.resume:
            return
        training.resume(
            global_steps=saved.global_steps,
            skipped_steps=saved.skipped_steps,
            micro_steps=saved.micro_steps,
            samples=saved.global_samples,
        )
        if self.generators is not None:
            generators.restore(self.generators)
        training.align_random()

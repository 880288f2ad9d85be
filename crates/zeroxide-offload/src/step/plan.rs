//! The optimizer step from its beginning to its end: what takes part, until when a unit must be done, and what an error
//! leaves. How its tiles pass through memory is in [`stream`](crate::stream).
//!
//! A step need not end before the next forward begins: a unit's update must only be done when the unit is next used.
//! [`Core::step_begin`] plans the step and starts its first reads. A thread goes on with it between calls
//! ([`driver`](crate::step::driver)), and every use of a unit drives the stream until that unit is done, in the order in
//! which the units are used. The numbers do not depend on who does what when: a tile's update reads only that tile.

use std::ops::Range;
use std::time::Instant;

use zeroxide_optim::{Draw, Optimizer, Step};

use crate::core::Core;
use crate::error::{Result, misuse};
use crate::step::Poison;
use crate::step::stream::{ActiveStep, Progress};
use crate::unit::{ParamState, Unit};

/// What a step has to do for one unit.
pub(crate) struct PlannedUnit {
    unit: usize,
    progress: Progress,
    tiles: Vec<u32>,
}

/// Elements that share every constant of the update.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) range: Range<u64>,
    pub(crate) step: Step,
    /// What they are rounded with, from the first of them on, in a format that rounds: it has elements of one parameter.
    pub(crate) draw: Draw,
}

impl Core {
    /// Begins one update of every parameter whose gradient has been accumulated; `grad_scale` multiplies the gradients.
    ///
    /// Where nothing is at home on disk, the step is done when this returns, unless steps are deferred. After an error the state is mixed and
    /// every further call says so.
    pub(crate) fn step_begin(&mut self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.check_usable()?;
        if self.state.fill.is_some() {
            return misuse("step", "a fill has not been committed");
        }
        self.check_constants(groups, grad_scale)?;
        let begun = self.step.count_begun() > 0;
        if !begun {
            self.finish_step()?;
        }
        self.check_exchanged()?;
        if !begun {
            self.catch_up_before_step()?;
        }
        if let Err(error) = self.finish_spills() {
            // Without gradients there is no step: what was to be a part of it goes, too.
            self.take_back()?;
            return Err(error);
        }
        self.state.cache.clear();
        self.wait_reads()?;
        let here = (0..self.units.len())
            .filter(|unit| !self.is_away(*unit) && !self.step.has_begun(*unit));
        let planned = here
            .map(|unit| self.plan_unit(unit, groups, grad_scale))
            .collect::<Result<Vec<_>>>()?;
        let early = self.step.early.take();
        if !begun {
            self.step.count += 1;
        }
        self.note_missed(groups);
        for param in self
            .units
            .iter_mut()
            .flat_map(|unit| &mut unit.params)
            .filter(|param| param.has_gradient())
        {
            param.updates += 1;
        }
        self.clear_gradients();
        self.accept_speculation(early)?;
        self.take_up(planned)?;
        if self.disk.is_none() && !self.step.deferred {
            return self.finish_step();
        }
        let started = self.start_all_reads().map(drop);
        self.record_outcome(started)
    }

    /// What the step has to do for one unit.
    pub(crate) fn plan_unit(
        &self,
        index: usize,
        groups: &[Optimizer],
        grad_scale: f64,
    ) -> Result<PlannedUnit> {
        let unit = &self.units[index];
        let plan = segments(unit, groups, grad_scale)?;
        let tiles = tiles_of(unit, &plan);
        Ok(PlannedUnit {
            unit: index,
            progress: Progress::new(unit, plan, tiles.len()),
            tiles,
        })
    }

    /// Adds units to the step under way, or to a new one, after those that it has.
    pub(crate) fn take_up(&mut self, planned: Vec<PlannedUnit>) -> Result<()> {
        for each in &planned {
            match (each.tiles.is_empty(), each.progress.plan.is_empty()) {
                (true, true) => {
                    self.weights_kept(each.unit);
                    self.release_unused(each.unit)?;
                }
                // This rank's shard may hold none of the parameters that are updated: padding, or others of the unit.
                (true, false) => {
                    self.release_unused(each.unit)?;
                    self.weights_renewed(each.unit);
                }
                _ => {}
            }
        }
        let (count, notify) = (self.units.len(), &self.step.notify);
        let step = self
            .step
            .active
            .get_or_insert_with(|| ActiveStep::new(notify, count));
        for each in planned {
            let tiles = each.tiles.into_iter().map(|tile| (each.unit, tile));
            step.work.extend(tiles);
            step.units[each.unit] = each.progress;
        }
        Ok(())
    }

    /// With several ranks, what a step uses has been summed over them: otherwise it would use what an earlier step
    /// left.
    fn check_exchanged(&self) -> Result<()> {
        if self.mesh.world() == 1 {
            return Ok(());
        }
        let missed = |unit: &&Unit| unit.fresh && unit.params.iter().any(ParamState::has_gradient);
        match self.units.iter().find(missed) {
            Some(unit) => misuse(
                "step",
                format!(
                    "gradients of unit {} have not been exchanged with the other ranks: the last backward before a step \
                     must be outside of no_sync, and start from an output of the engine",
                    unit.name
                ),
            ),
            None => Ok(()),
        }
    }

    /// Ends the step that has begun, if there is one.
    pub(crate) fn finish_step(&mut self) -> Result<()> {
        self.drive(|step| step.writes == 0 && step.is_updated(), Core::advance)?;
        self.retire_step()
    }

    /// Notes, without waiting, what the disk has done; where nothing is left, the step ends and the staging ring gives
    /// its
    /// memory back: backward, which needs the most of it, does not use the ring.
    pub(crate) fn retire_step(&mut self) -> Result<()> {
        let updated = self
            .step
            .active
            .as_ref()
            .is_some_and(ActiveStep::is_updated);
        // More units are to come where backward updates.
        if !updated || self.step.early.is_some() {
            return Ok(());
        }
        let noted = self.note_completions();
        self.record_outcome(noted)?;
        if self
            .step
            .active
            .as_ref()
            .is_some_and(|step| step.writes == 0)
        {
            self.step.active = None;
            if let Some(disk) = &self.disk {
                disk.ring.discard_if_free()?;
            }
        }
        Ok(())
    }

    /// Goes on with the step until the unit's weights in memory, if they are there, are the new ones.
    pub(crate) fn finish_unit(&mut self, unit: usize) -> Result<()> {
        self.drive(|step| step.units[unit].tiles == 0, Core::advance)
    }

    /// As [`finish_unit`](Self::finish_unit), and until all of it is on disk.
    pub(crate) fn finish_writes(&mut self, unit: usize) -> Result<()> {
        self.finish_unit(unit)?;
        self.drive(|step| step.units[unit].writes == 0, Core::step_receive)
    }

    /// Whether the step still has something to do for the unit.
    pub(crate) fn is_stepping(&self, unit: usize) -> bool {
        self.step
            .active
            .as_ref()
            .is_some_and(|step| step.units[unit].tiles > 0 || step.units[unit].writes > 0)
    }

    /// Drops what is left of the step: waits for what is in flight and forgets the rest.
    pub(crate) fn abandon_step(&mut self) {
        while self.step.active.as_ref().is_some_and(ActiveStep::in_flight) {
            if self.step_receive().is_err()
                && !self.step.active.as_ref().is_some_and(ActiveStep::in_flight)
            {
                break;
            }
        }
        self.step.active = None;
    }

    /// Repeats `act` until `done` says so, or until there is no step. An error ends the step for good.
    fn drive(
        &mut self,
        done: impl Fn(&ActiveStep) -> bool,
        act: impl Fn(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.check_usable()?;
        let start = Instant::now();
        let mut outcome = Ok(());
        while outcome.is_ok() && self.step.active.as_ref().is_some_and(|step| !done(step)) {
            let acted = act(self);
            outcome = self.record_outcome(acted);
        }
        self.step.updating.add(start.elapsed());
        outcome
    }

    /// After an error the state is mixed: the step ends, and no buffer is given up before the disk is done with it.
    pub(crate) fn record_outcome<T>(&mut self, outcome: Result<T>) -> Result<T> {
        if let Err(error) = &outcome {
            let step = self.step.count;
            self.step
                .poisoned
                .get_or_insert_with(|| Poison::new(step, &error, false));
            self.abandon_step();
        }
        outcome
    }
}

/// The runs of equal constants among the parameters whose gradient has been accumulated, in layout order.
///
/// Padding between two of them joins the run: its gradient, weight and moments are zero and stay zero.
fn segments(unit: &Unit, groups: &[Optimizer], grad_scale: f64) -> Result<Vec<Segment>> {
    Ok(constant_runs(unit, groups)?
        .into_iter()
        .map(|(group, updates, range, stream)| Segment {
            range,
            step: groups[group].prepare(updates + 1, grad_scale),
            draw: Draw {
                stream,
                updates,
                first: 0,
            },
        })
        .collect())
}

/// Group, updates before this one, elements, and the random bits of the first parameter among them.
pub(crate) type ConstantRange = (usize, u64, Range<u64>, u64);

/// The same runs. In a format that rounds, each parameter is a run of its own, with random bits of its own.
pub(crate) fn constant_runs(unit: &Unit, groups: &[Optimizer]) -> Result<Vec<ConstantRange>> {
    let joins = unit.tensors.format().is_exact();
    let mut order: Vec<usize> = (0..unit.params.len())
        .filter(|param| unit.params[*param].has_gradient())
        .collect();
    order.sort_by_key(|param| unit.layout.offset(*param));
    let mut found: Vec<ConstantRange> = Vec::new();
    for param in order {
        let state = &unit.params[param];
        check_group(unit, state.group, groups)?;
        let start = unit.layout.offset(param);
        let range = start..start + unit.layout.numel(param);
        match found.last_mut() {
            Some((group, updates, run, _))
                if joins
                    && *group == state.group
                    && *updates == state.updates
                    && range.start - run.end < zeroxide_layout::PARAM_ALIGN =>
            {
                run.end = range.end;
            }
            _ => found.push((state.group, state.updates, range, state.stream)),
        }
    }
    Ok(found)
}

/// The tiles of the unit that a step takes which does this.
pub(crate) fn tiles_of(unit: &Unit, plan: &[Segment]) -> Vec<u32> {
    // Moments that are not on disk yet must all be written, also where there is no gradient.
    let all = unit.state.is_pristine() && !plan.is_empty();
    (0..unit.state_tiles.count())
        .filter(|tile| all || overlaps(plan, &unit.flat(&unit.state_tiles.range(*tile))))
        .collect()
}

pub(crate) fn check_group(unit: &Unit, group: usize, groups: &[Optimizer]) -> Result<()> {
    match groups.get(group) {
        None => misuse(
            "step",
            format!("{} is in group {group} of {}", unit.name, groups.len()),
        ),
        Some(optimizer) if optimizer.name() != unit.rule => misuse(
            "step",
            format!(
                "group {group} is now {}, and the state of {} is that of {}: a group keeps its optimizer",
                optimizer.name(),
                unit.name,
                unit.rule
            ),
        ),
        Some(_) => Ok(()),
    }
}

fn overlaps(plan: &[Segment], range: &Range<u64>) -> bool {
    plan.iter()
        .any(|segment| segment.range.start < range.end && range.start < segment.range.end)
}

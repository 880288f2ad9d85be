//! Steps that a unit has missed because nothing used it, made up for before its next use.
//!
//! A step with a gradient of zero still changes a parameter: weights decay, and so do moments, which go on moving it.
//! Of a unit that is [`lazy`](crate::unit::Unit::lazy) such steps are remembered, as the optimizers of each step, and
//! taken one after the other while its tiles pass through memory once. What comes of it has the bits of the steps taken
//! in time: each is the same arithmetic with the same constants and the same random bits, of one element alone.

use std::collections::VecDeque;

use zeroxide_optim::{Draw, Optimizer};

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::step::plan::{Segment, check_group};
use crate::step::stream::ActiveStep;
use crate::unit::{ParamState, Unit};

/// Steps remembered at most: a unit that has missed as many is made up for in the next step, used or not.
pub(crate) const MOST_MISSED: u64 = 256;

/// The optimizers, group by group, of the latest steps; as many as any parameter has missed.
#[derive(Default)]
pub(crate) struct MissedSteps {
    steps: VecDeque<Vec<Optimizer>>,
}

impl MissedSteps {
    /// A step was taken with `groups`, of which some parameter has missed `most`, this one included.
    fn note(&mut self, groups: &[Optimizer], most: u64) {
        self.steps.push_back(groups.to_vec());
        let kept = to_usize(most).min(self.steps.len());
        self.steps.drain(..self.steps.len() - kept);
    }

    /// The last `count` steps, the oldest first.
    fn last(&self, count: u64) -> impl Iterator<Item = &Vec<Optimizer>> {
        self.steps.range(self.steps.len() - to_usize(count)..)
    }
}

impl Unit {
    /// Steps that the parameter of the unit has missed that has missed most.
    fn missed(&self) -> u64 {
        self.params
            .iter()
            .map(|param| param.missed)
            .max()
            .unwrap_or(0)
    }
}

impl Core {
    /// From here on a step leaves parameters of the unit alone that have no gradient, and makes up for that later.
    pub(crate) fn set_lazy(&mut self, unit: usize) -> Result<()> {
        self.check_unit("set_lazy", unit)?;
        self.check_here("set_lazy", unit)?;
        if !self.units[unit].mesh.has_all() {
            return misuse("set_lazy", "a unit of several ranks");
        }
        self.units[unit].lazy = true;
        Ok(())
    }

    /// Whether the unit's values are those of a step before the last.
    pub(crate) fn is_behind(&self, unit: usize) -> bool {
        self.units[unit].missed() > 0
    }

    /// Begins to make up for what the unit has missed, as tiles of the step under way that come first. Whoever needs its
    /// values then goes on until it is done with, as after a step.
    pub(crate) fn catch_up(&mut self, unit: usize) -> Result<()> {
        if !self.is_behind(unit) {
            return Ok(());
        }
        self.check_usable()?;
        self.finish_writes(unit)?;
        self.state.cache.clear();
        let plan = missed_segments(&self.units[unit], &self.step.missed)?;
        for param in &mut self.units[unit].params {
            param.updates += param.missed;
            param.missed = 0;
        }
        let notify = &self.step.notify;
        let step = self
            .step
            .active
            .get_or_insert_with(|| ActiveStep::of_nothing(notify, self.units.len()));
        step.add_first(unit, &self.units[unit], plan);
        Ok(())
    }

    /// Before a step: makes up for units that have a gradient, and for those of which no further step can be remembered.
    pub(crate) fn catch_up_before_step(&mut self) -> Result<()> {
        for unit in 0..self.units.len() {
            let this = &self.units[unit];
            let takes_part = this.params.iter().any(ParamState::has_gradient);
            if this.missed() >= if takes_part { 1 } else { MOST_MISSED } {
                self.catch_up(unit)?;
            }
        }
        self.finish_step()
    }

    /// After a step was planned with `groups`: parameters of lazy units without a gradient have missed it.
    pub(crate) fn note_missed(&mut self, groups: &[Optimizer]) {
        let lazy = self.units.iter_mut().filter(|unit| unit.lazy);
        for param in lazy.flat_map(|unit| &mut unit.params) {
            if param.trainable && !param.has_gradient() {
                param.missed += 1;
            }
        }
        let most = self.units.iter().map(Unit::missed).max().unwrap_or(0);
        if most > 0 {
            self.step.missed.note(groups, most);
        }
    }
}

/// What each parameter of the unit has missed, step after step.
fn missed_segments(unit: &Unit, missed: &MissedSteps) -> Result<Vec<Segment>> {
    let mut found = Vec::new();
    for (param, state) in unit.params.iter().enumerate() {
        let start = unit.layout.offset(param);
        let range = start..start + unit.layout.numel(param);
        for (groups, updates) in missed.last(state.missed).zip(state.updates..) {
            check_group(unit, state.group, groups)?;
            found.push(Segment {
                range: range.clone(),
                // A gradient of zero is zero, whatever it is multiplied with.
                step: groups[state.group].prepare(updates + 1, 1.0),
                draw: Draw {
                    stream: state.stream,
                    updates,
                    first: 0,
                },
            });
        }
    }
    Ok(found)
}

//! Units that are at home on the device that computes: the core keeps the books of their parameters (which have had a
//! gradient, its norm, how often each was updated, in which group it is) and not one byte of them.
//!
//! So the norm over all parameters, what is left out of a step and how updates are counted are decided in one place,
//! wherever a unit is. The caller keeps the bytes: it says when a gradient has come and what its norm is, and asks before
//! a step what of the unit is updated with which constants.

use zeroxide_optim::{AccumulateStats, Optimizer};

use crate::core::Core;
use crate::error::{Result, misuse};
use crate::step::Poison;
use crate::step::plan::constant_runs;
use crate::unit::StateBlocks;

/// Elements of a unit's layout that share every constant of an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwayRun {
    /// First element in the layout.
    pub start: u64,
    /// Elements, with the padding between parameters that follow one another.
    pub count: u64,
    /// Index into the groups that the step is given.
    pub group: usize,
    /// Updates made before this one.
    pub updates: u64,
    /// The random bits of the parameter, for a format that rounds, where each is a run of its own.
    pub stream: u64,
}

impl Core {
    /// Whether all of the unit is on the device that computes.
    pub(crate) fn is_away(&self, unit: usize) -> bool {
        matches!(self.units[unit].state, StateBlocks::Away)
    }

    /// Refuses a call about bytes that are not the core's.
    pub(crate) fn check_here(&self, call: &'static str, unit: usize) -> Result<()> {
        self.check_unit(call, unit)?;
        if !self.is_away(unit) {
            return Ok(());
        }
        misuse(
            call,
            format!(
                "unit {} is at home on the device that computes: the core has no byte of it",
                self.units[unit].name
            ),
        )
    }

    /// Refuses a call about the books of a unit whose bytes the core has, too.
    fn check_away(&self, call: &'static str, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_unit(call, unit)?;
        if self.is_away(unit) {
            return Ok(());
        }
        misuse(
            call,
            format!("unit {} is at home in the core", self.units[unit].name),
        )
    }

    /// A parameter's gradient has come, whole. Returns whether it had one: what has come is added to that.
    pub(crate) fn note_gradient(&mut self, unit: usize, param: usize) -> Result<bool> {
        self.check_away("note_gradient", unit)?;
        self.check_param("note_gradient", unit, param)?;
        let state = &mut self.units[unit].params[param];
        if !state.trainable {
            return misuse(
                "note_gradient",
                format!("parameter {param} of {} is frozen", self.units[unit].name),
            );
        }
        let before = state.has_gradient();
        state.arrived(false);
        Ok(before)
    }

    /// The sum of squares of a parameter's gradient as it is now, and whether it holds an infinity or a NaN.
    pub(crate) fn note_norm(
        &mut self,
        unit: usize,
        param: usize,
        norm: AccumulateStats,
    ) -> Result<()> {
        self.check_away("note_norm", unit)?;
        self.check_param("note_norm", unit, param)?;
        self.units[unit].params[param].norm = norm;
        Ok(())
    }

    /// The caller's part of a step has failed: the state is that of two steps.
    pub(crate) fn fail_step(&mut self, cause: &str, begun: bool) {
        let step = self.step.count + u64::from(!begun);
        self.step
            .poisoned
            .get_or_insert_with(|| Poison::new(step, &cause, true));
        self.abandon_step();
    }

    /// What the next step updates of the unit, in layout order.
    pub(crate) fn away_runs(&self, unit: usize, groups: &[Optimizer]) -> Result<Vec<AwayRun>> {
        self.check_away("away_runs", unit)?;
        let found = constant_runs(&self.units[unit], groups)?;
        Ok(found
            .into_iter()
            .map(|(group, updates, range, stream)| AwayRun {
                start: range.start,
                count: range.end - range.start,
                group,
                updates,
                stream,
            })
            .collect())
    }
}

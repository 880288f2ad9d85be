//! Updates that begin inside of backward: a unit's as soon as its gradients are complete, where nothing has to be known
//! of all gradients first. Their memory is free again when the unit is updated, and the disk works under backward.
//!
//! [`Core::begin_early`] fixes the constants of the step, [`Core::update_early`] begins one unit's update, and the step
//! itself updates what is left and ends it. The bits are those of a step that begins after backward: the same kernels
//! with the same constants, each over one tile. Between the first update and the step the state is of neither: what
//! would see it is refused, and what fails leaves it mixed and says so, unless it can be taken back
//! ([`speculation`](crate::step::speculation)).

use zeroxide_optim::Optimizer;

use crate::core::Core;
use crate::error::{OffloadError, Result, misuse};
use crate::step::speculation::Speculation;
use crate::step::{Poison, Step};
use crate::weights::residence::Residence;

/// A step whose updates may begin before it.
pub(crate) struct EarlyUpdates {
    groups: Vec<Optimizer>,
    grad_scale: f64,
    /// Of each unit, whether its update has begun.
    pub(super) begun: Vec<bool>,
    /// Present where what is updated may be taken back.
    pub(super) speculation: Option<Speculation>,
}

impl Step {
    /// Whether the unit's update has begun before its step.
    pub(crate) fn has_begun(&self, unit: usize) -> bool {
        self.early.as_ref().is_some_and(|early| early.begun[unit])
    }

    /// Units whose update has begun before their step.
    pub(crate) fn count_begun(&self) -> usize {
        let early = self.early.iter();
        early
            .flat_map(|early| &early.begun)
            .filter(|begun| **begun)
            .count()
    }
}

impl Core {
    /// From here until the step, units may be updated as soon as their gradients are complete, with these constants.
    pub(crate) fn begin_early(&mut self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("begin_early")?;
        if self.mesh.world() > 1 || (0..self.units.len()).any(|unit| self.is_away(unit)) {
            return misuse(
                "begin_early",
                "gradients of several ranks or of units on a device are complete at the end of backward",
            );
        }
        if let Some(lazy) = self.units.iter().find(|unit| unit.lazy) {
            return misuse(
                "begin_early",
                format!(
                    "unit {} makes up for steps that it has missed before it takes part in one",
                    lazy.name
                ),
            );
        }
        self.finish_step()?;
        self.step.early = Some(EarlyUpdates {
            groups: groups.to_vec(),
            grad_scale,
            begun: vec![false; self.units.len()],
            speculation: None,
        });
        Ok(())
    }

    /// Begins the update of a unit whose gradients are complete; until the step none of it may be used. Idempotent.
    pub(crate) fn update_early(&mut self, unit: usize) -> Result<()> {
        self.check_usable()?;
        self.check_here("update_early", unit)?;
        if self.step.has_begun(unit) || self.waits_for_step(unit) {
            return Ok(());
        }
        let Some(early) = &self.step.early else {
            return misuse("update_early", "no step has been announced");
        };
        let (groups, grad_scale) = (early.groups.clone(), early.grad_scale);
        let outcome = self.update_now(unit, &groups, grad_scale);
        if outcome.is_err() && self.step.count_begun() > 0 {
            return self.record_outcome(outcome);
        }
        outcome
    }

    fn update_now(&mut self, unit: usize, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        let this = &self.units[unit];
        let mut trained = this.params.iter().filter(|param| param.has_gradient());
        if trained.any(|param| param.norm.nonfinite) {
            return Err(OffloadError::NotFinite {
                unit: this.name.clone(),
                updated: self.step.count_begun(),
            });
        }
        self.await_spilled(unit)?;
        self.state.cache.clear();
        if matches!(self.residence(unit), Some(Residence::Arriving { .. })) {
            self.await_arrival(unit)?;
        }
        let planned = self.plan_unit(unit, groups, grad_scale)?;
        if self.step.count_begun() == 0 {
            self.step.count += 1;
        }
        if let Some(early) = &mut self.step.early {
            early.begun[unit] = true;
        }
        self.take_up(vec![planned])?;
        if self.disk.is_none() && !self.step.deferred {
            return self.finish_unit(unit);
        }
        let started = self.start_all_reads().map(drop);
        self.record_outcome(started)
    }

    /// Backward has failed with `cause`: no unit is updated any more before the step. Where one had been, the state is
    /// mixed and every later call says so, unless it is taken back. Returns whether the state is mixed.
    pub(crate) fn fail_early(&mut self, cause: &str) -> bool {
        if self.step.is_speculating() && self.step.poisoned.is_none() {
            return self.take_back().is_err();
        }
        let begun = self.step.count_begun() > 0;
        if begun {
            let step = self.step.count;
            self.step
                .poisoned
                .get_or_insert_with(|| Poison::new(step, &cause, false));
            self.abandon_step();
        }
        self.step.early = None;
        begun
    }

    /// The step ends what began before it: refuses other constants than those, with which it has begun.
    pub(crate) fn check_constants(&self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        let Some(early) = &self.step.early else {
            return Ok(());
        };
        #[expect(clippy::float_cmp, reason = "the same value is asked for")]
        let same = early.groups == groups && early.grad_scale == grad_scale;
        if same || self.step.count_begun() == 0 {
            return Ok(());
        }
        Err(OffloadError::OtherConstants)
    }

    /// Refuses what must not see a step of which a part has been made.
    pub(crate) fn check_between_steps(&self, call: &'static str) -> Result<()> {
        if self.step.count_begun() == 0 {
            return Ok(());
        }
        Err(OffloadError::InsideStep { call })
    }

    /// Refuses a use of a unit whose update has begun before its step: its weights are those of after the step.
    pub(crate) fn check_not_begun(&self, call: &'static str, unit: usize) -> Result<()> {
        if !self.step.has_begun(unit) {
            return Ok(());
        }
        Err(OffloadError::UpdatedEarly {
            call,
            unit: self.units[unit].name.clone(),
        })
    }
}

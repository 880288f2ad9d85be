//! Updates inside of backward that may be taken back, where only the norm of all gradients says what a step must be.
//!
//! A unit whose gradients are complete is updated as if nothing were to be clipped. What the update writes goes to the
//! other place of each tile, and its gradients stay. If that was the step, [`Core::step_begin`] ends it as it ends every
//! early step. If not, [`Core::take_back`] makes the versions of before the newest again, and an ordinary step, or none,
//! follows. Units of which weights or state have no second place wait for the step.

use zeroxide_optim::Optimizer;

use crate::core::Core;
use crate::error::{Result, misuse};
use crate::gradients::kept::KeptGradients;
use crate::step::Step;
use crate::step::early::EarlyUpdates;
use crate::unit::StateBlocks;
use crate::weights::residence::Residence;

/// What it takes to go back to before a step.
pub(crate) struct Speculation {
    /// Of each unit, whether its moments had never been written.
    pristine: Vec<bool>,
    /// A gradient is not finite: no further unit is updated before the step.
    ended: bool,
}

impl Step {
    /// Whether what backward updates may be taken back.
    pub(crate) fn is_speculating(&self) -> bool {
        let early = self.early.as_ref();
        early.is_some_and(|early| early.speculation.is_some())
    }
}

impl Core {
    /// As [`begin_early`](Self::begin_early), for updates that may be taken back until the step.
    pub(crate) fn begin_speculation(
        &mut self,
        groups: &[Optimizer],
        grad_scale: f64,
    ) -> Result<()> {
        let consumed = (0..self.units.len()).any(|unit| self.gradients.spill.is_consumed(unit));
        if self.disk.is_none() || consumed {
            return misuse(
                "begin_speculation",
                "state has no second place, or gradients have none until the step",
            );
        }
        self.begin_early(groups, grad_scale)?;
        // Every write of the step before has ended: what is kept is complete.
        if let Err(error) = self.disk().store.keep_newest() {
            self.step.early = None;
            return Err(error.into());
        }
        let pristine = self.units.iter().map(|unit| unit.state.is_pristine());
        let speculation = Speculation {
            pristine: pristine.collect(),
            ended: false,
        };
        if let Some(early) = &mut self.step.early {
            early.speculation = Some(speculation);
        }
        Ok(())
    }

    /// Whether the unit is updated by the step alone, since nothing could take its update back or one is not to be made.
    pub(crate) fn waits_for_step(&mut self, unit: usize) -> bool {
        let this = &self.units[unit];
        let spare = matches!(this.state, StateBlocks::Disk { .. }) && this.weights.on_disk();
        let mut trained = this.params.iter().filter(|param| param.has_gradient());
        let nonfinite = trained.any(|param| param.norm.nonfinite);
        let early = self.step.early.as_mut();
        let Some(speculation) = early.and_then(|early| early.speculation.as_mut()) else {
            return false;
        };
        speculation.ended |= nonfinite;
        speculation.ended || !spare
    }

    /// The unit has been updated: its gradients stay until the step has said that they are not needed.
    pub(crate) fn keep_gradients(&mut self, unit: usize) -> Result<()> {
        if self.gradients.spill.is_shared(unit)
            && matches!(self.units[unit].grad, KeptGradients::Here(_))
        {
            return self.spill(unit);
        }
        Ok(())
    }

    /// What backward has updated was the step: gradients of units that are updated are not needed any more. Those of the
    /// others leave with their update.
    pub(crate) fn accept_speculation(&mut self, early: Option<EarlyUpdates>) -> Result<()> {
        let Some(early) = early.filter(|early| early.speculation.is_some()) else {
            return Ok(());
        };
        for unit in 0..self.units.len() {
            if early.begun[unit] && !self.step.is_updating(unit) {
                self.release_gradients(unit)?;
            }
        }
        Ok(())
    }

    /// Makes all weights and state what they were before backward updated them; gradients stay. Returns whether backward
    /// had updated anything. Nothing is announced any more.
    pub(crate) fn take_back(&mut self) -> Result<bool> {
        self.check_usable()?;
        if !self.step.is_speculating() {
            return Ok(false);
        }
        let begun = self.step.count_begun() > 0;
        if begun {
            self.abandon_step();
        }
        let Some(EarlyUpdates {
            begun: units,
            speculation: Some(speculation),
            ..
        }) = self.step.early.take()
        else {
            return Ok(false);
        };
        if begun {
            self.state.cache.clear();
            self.step.count -= 1;
            let outcome = self.restore_kept(&units, &speculation);
            self.record_outcome(outcome)?;
        }
        Ok(begun)
    }

    fn restore_kept(&mut self, units: &[bool], speculation: &Speculation) -> Result<()> {
        for (unit, begun) in units.iter().enumerate() {
            if !begun {
                continue;
            }
            if matches!(self.residence(unit), Some(Residence::Arriving { .. })) {
                self.await_arrival(unit)?;
            }
            // What lies under the window is new; at home is what was kept.
            if !matches!(self.residence(unit), None | Some(Residence::Away)) {
                self.evict(unit)?;
            }
            if let StateBlocks::Disk { pristine } = &mut self.units[unit].state {
                *pristine = speculation.pristine[unit];
            }
        }
        let disk = self.disk();
        disk.store.take_back()?;
        disk.ring.discard_if_free()?;
        Ok(())
    }
}

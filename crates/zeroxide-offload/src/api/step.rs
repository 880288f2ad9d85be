//! The public face, where it is about the optimizer step.

use zeroxide_optim::Optimizer;

use crate::api::Offload;
use crate::core::Core;
use crate::error::Result;
use crate::weights::residence::Lent;

impl Offload {
    /// Puts a parameter into one of the groups that [`step`](Self::step) is given.
    pub fn set_group(&self, unit: usize, param: usize, group: usize) -> Result<()> {
        self.with("set_group", |core| {
            core.check_param("set_group", unit, param)?;
            core.catch_up(unit)?;
            core.units[unit].params[param].group = group;
            Ok(())
        })
    }

    /// From here on a [`step`](Self::step) leaves parameters of the unit alone that have no gradient. The unit's next
    /// use makes up for it: what a step with a gradient of zero would have done, with the same bits. Of one rank's.
    pub fn set_lazy(&self, unit: usize) -> Result<()> {
        self.with("set_lazy", |core| core.set_lazy(unit))
    }

    /// Lends weight and gradient of the only parameter of a unit until the next step ends.
    pub fn lend(&self, unit: usize, lent: Lent) -> Result<()> {
        self.with("lend", |core| core.lend(unit, lent))
    }

    /// One update of every parameter whose gradient has been accumulated; `grad_scale` multiplies the gradients.
    ///
    /// With state at home on disk, or where steps are deferred, this returns while the step is under way; each later use of a unit waits until that
    /// unit is done. Errors of the rest come out there, or at [`finish`](Self::finish).
    pub fn step(&self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.with("step", |core| core.step(groups, grad_scale))
    }

    /// From here until [`step`](Self::step), which takes the same constants, units may be updated inside of backward as
    /// soon as their gradients are complete. Finishes the step before it.
    pub fn begin_early(&self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.with("begin_early", |core| core.begin_early(groups, grad_scale))
    }

    /// As [`begin_early`](Self::begin_early), for updates that [`take_back`](Self::take_back) may undo until the step: of
    /// units whose weights and state are on disk. The others wait for the step.
    pub fn begin_speculation(&self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.with("begin_speculation", |core| {
            core.begin_speculation(groups, grad_scale)
        })
    }

    /// Makes weights and state what they were before backward updated them; gradients stay, and a step with any constants
    /// may follow. Returns whether backward had updated anything.
    pub fn take_back(&self) -> Result<bool> {
        self.with("take_back", Core::take_back)
    }

    /// Begins the update of a unit whose gradients are complete. Until the step it may not be used.
    pub fn update_early(&self, unit: usize) -> Result<()> {
        self.with("update_early", |core| core.update_early(unit))
    }

    /// A backward failed with `cause` that may have updated. Returns whether that is not taken back: then every later call
    /// says that the state is mixed.
    pub fn fail_early(&self, cause: &str) -> Result<bool> {
        self.with("fail_early", |core| Ok(core.fail_early(cause)))
    }

    /// Ends all work with the state: a step failed with `cause` where the caller updates units that are away, before
    /// [`step`](Self::step) was called for it or, if it has `begun`, after. Every later call says so.
    pub fn fail_step(&self, cause: &str, begun: bool) -> Result<()> {
        self.with("fail_step", |core| {
            core.fail_step(cause, begun);
            Ok(())
        })
    }

    /// Refuses a state that is mixed, as calls that use it do.
    pub fn check_usable(&self) -> Result<()> {
        self.with("check_usable", |core| core.check_usable())
    }

    /// Ends the step under way, if there is one.
    pub fn finish(&self) -> Result<()> {
        self.with("finish", Core::finish_step)
    }
}

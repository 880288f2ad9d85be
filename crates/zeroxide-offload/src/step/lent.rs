//! Parameters that belong to the caller: lent for the time of one step, and given back with it.

use zeroxide_optim::Optimizer;

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::weights::residence::{Lent, UnitWeights};

impl Core {
    /// Takes weight and gradient of the only parameter of a unit until the next step ends.
    pub(crate) fn lend(&mut self, unit: usize, lent: Lent) -> Result<()> {
        self.check_unit("lend", unit)?;
        let this = &mut self.units[unit];
        let numel = to_usize(this.layout.numel(0));
        let (weight, grad) = (numel * self.compute.size(), numel * lent.grad_dtype.size());
        if this.params.len() != 1 || lent.weight.len() != weight || lent.grad.len() != grad {
            return misuse(
                "lend",
                format!(
                    "{}: expected one parameter of {weight} bytes and {grad} of gradient, got {} and {}",
                    this.name,
                    lent.weight.len(),
                    lent.grad.len()
                ),
            );
        }
        let UnitWeights::Borrowed { lent: place } = &mut this.weights else {
            return misuse("lend", format!("{} keeps its own weights", this.name));
        };
        *place = Some(lent);
        this.params[0].arrived(false);
        Ok(())
    }

    /// Begins a step, and ends it where something was lent for it: the caller gets that back when this returns.
    pub(crate) fn step(&mut self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        let borrows = self
            .units
            .iter()
            .any(|unit| matches!(unit.weights, UnitWeights::Borrowed { lent: Some(_) }));
        let mut outcome = self.step_begin(groups, grad_scale);
        if borrows && outcome.is_ok() {
            outcome = self.finish_step();
        }
        for unit in &mut self.units {
            if let UnitWeights::Borrowed { lent } = &mut unit.weights {
                *lent = None;
            }
        }
        outcome
    }
}

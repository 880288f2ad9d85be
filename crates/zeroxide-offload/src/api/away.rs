//! The public face, where it is about units that are at home on the device that computes.

use zeroxide_optim::{AccumulateStats, Optimizer};

use crate::api::Offload;
use crate::away::AwayRun;
use crate::error::Result;

impl Offload {
    /// A gradient of a unit that is away has come. Returns whether the parameter had one.
    pub fn note_gradient(&self, unit: usize, param: usize) -> Result<bool> {
        self.with("note_gradient", |core| core.note_gradient(unit, param))
    }

    /// The sum of squares of that gradient, and whether it holds an infinity or a NaN.
    pub fn note_norm(&self, unit: usize, param: usize, norm: AccumulateStats) -> Result<()> {
        self.with("note_norm", |core| core.note_norm(unit, param, norm))
    }

    /// What the next [`step`](Self::step) updates of a unit that is away, in layout order.
    pub fn away_runs(&self, unit: usize, groups: &[Optimizer]) -> Result<Vec<AwayRun>> {
        self.with("away_runs", |core| core.away_runs(unit, groups))
    }
}

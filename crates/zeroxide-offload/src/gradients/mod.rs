//! Gradients: accumulated as they arrive, summed over ranks, and how they travel.

pub(crate) mod accumulate;
pub(crate) mod kept;
mod reduce;
pub(crate) mod spill;
pub(crate) mod transport;

use zeroxide_layout::Dtype;

use crate::gradients::spill::Spill;
use crate::gradients::transport::GradientTransport;

/// What all units' gradients share: how they reach the ranks that keep them, and in which dtypes.
pub(crate) struct Gradients {
    pub(crate) transport: GradientTransport,
    /// In which they travel.
    pub(crate) comm_dtype: Dtype,
    /// What the sum over ranks is multiplied with.
    pub(crate) reduce_scale: f32,
    /// Whether they travel as integers: what belongs to no parameter must then be zero, since it counts for a scale.
    pub(crate) quantised: bool,
    /// In which they are kept and accumulated.
    pub(crate) dtype: Dtype,
    /// Gradients at home on disk, while they are in memory or on their way.
    pub(crate) spill: Spill,
}

//! Gradients: accumulated as they arrive, summed over ranks, and how they travel.

pub(crate) mod accumulate;
mod reduce;
pub(crate) mod transport;

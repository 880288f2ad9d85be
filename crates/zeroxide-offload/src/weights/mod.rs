//! Live weights: where they are, how they come under their windows, and who reads them unannounced.

pub(crate) mod bringer;
mod cover;
pub(crate) mod gather;
pub(crate) mod residence;
mod rewrite;
pub(crate) mod stray;

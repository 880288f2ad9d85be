//! Values of weights and optimizer state: filled, read and replaced, parameter by parameter.

mod edit;
pub(crate) mod fill;
mod raw;
pub(crate) mod read;

#![forbid(unsafe_code)]
//! Tiers, gathering and the streaming optimizer step: what joins memory, disk and kernels.
//!
//! [`Offload`] is the only entry. Its calls may come from any thread; each holds the state for as long as it runs.

mod core;
mod error;
mod gather;
mod landing;
mod offload;
mod settings;
mod step;
mod transfer;
mod unit;
mod update;
mod weights;

pub use error::{OffloadError, Result};
pub use landing::GradNorm;
pub use offload::{IoReport, Offload};
pub use settings::{Settings, StateHome, UnitSpec, WeightHome};
pub use transfer::Part;
pub use weights::Lent;

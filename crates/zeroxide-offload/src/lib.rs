#![forbid(unsafe_code)]
//! Tiers, gathering and the streaming optimizer step: what joins memory, disk and kernels.
//!
//! [`Offload`] is the only entry. Its calls may come from any thread; each holds the state for as long as it runs.

mod bringer;
mod core;
mod cover;
mod edit;
mod error;
mod fill;
mod gather;
mod gathering;
mod homes;
mod io_report;
mod landing;
mod mail;
mod offload;
mod raw;
mod read;
mod reduce;
mod rewrite;
mod settings;
mod step;
mod stray;
mod stream;
mod unit;
mod update;
mod weights;

pub use bringer::Bringer;
pub use error::{OffloadError, Result};
pub use fill::Part;
pub use io_report::IoReport;
pub use landing::GradNorm;
pub use offload::Offload;
pub use settings::{Place, Settings, StateHome, UnitSpec, WeightHome, Wire};
pub use weights::Lent;
pub use zeroxide_exchange::{ExchangeError, Seat, Stop};

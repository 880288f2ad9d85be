#![forbid(unsafe_code)]
//! Tiers, gathering and the streaming optimizer step: what joins memory, disk and kernels.
//!
//! [`Offload`] is the only entry. Its calls may come from any thread; each holds the state for as long as it runs.

mod api;
mod away;
mod build;
mod core;
mod disk;
mod durable;
mod error;
mod facts;
mod gradients;
mod homes;
mod io_report;
mod rooms;
mod settings;
mod state;
mod step;
mod sync;
mod tile_io;
mod unit;
mod weights;

pub use api::Offload;
pub use away::AwayRun;
pub use durable::reads::CommittedReads;
pub use error::{OffloadError, Result};
pub use facts::{Concern, Fact, Facts, Named};
pub use gradients::accumulate::GradNorm;
pub use io_report::IoReport;
pub use rooms::Room;
pub use settings::{
    GradientHome, Mesh, MeshPosition, Quantisation, Settings, StateHome, Transport, UnitSpec,
    WeightHome,
};
pub use weights::bringer::Bringer;
pub use weights::residence::Lent;
pub use zeroxide_exchange::{CancelToken, ExchangeError, SegmentHandle};
pub use zeroxide_storage::Commit;

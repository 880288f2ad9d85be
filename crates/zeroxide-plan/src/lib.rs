//! The plan of a training run: where each unit's weights, gradients and optimizer state are at home, how many bytes of
//! each budget bucket that takes, and what a step will exchange and read.
//!
//! Everything follows from shapes, the mesh, dtypes and budgets. The crate is arithmetic only: it allocates small tables,
//! touches no file, device or thread, and contains no `unsafe`. The core that trains and the report that a user reads
//! take their numbers from here, so that they cannot differ.
//!
//! [`Placement`] is what shapes and homes alone decide; [`Plan`] chooses homes, ring and frames on top of it and compares
//! the sum with the budget; [`Schedule`] plays a step.

#![forbid(unsafe_code)]

mod buckets;
mod device;
mod error;
mod home;
mod limits;
mod mesh;
mod placement;
mod plan;
mod quantisation;
mod schedule;
mod spill;
mod transit;
mod unit;

pub use buckets::Buckets;
pub use device::{DeviceBuckets, DeviceRequest, DeviceShare};
pub use error::{PlanError, Result};
pub use home::{GradientHome, StateHome, Transport, WeightHome};
pub use mesh::Mesh;
pub use placement::{
    DEFAULT_STAGING_BYTES, DEFAULT_TILE_ELEMENTS, Dtypes, MIN_TILES_IN_RING, Placement,
};
pub use plan::{FRAGMENTS, GRADIENTS_IN_MEMORY, Passed, Plan, PlanRequest, UnitRequest};
pub use quantisation::{BLOCK, Quantisation, gradient_message, weight_message};
pub use schedule::{Collective, CollectiveKind, Pass, Phase, Schedule};
pub use spill::{GradientRooms, SPILL_SLOTS};
pub use transit::{SLOTS, Transit};
pub use unit::{LocalShard, PlacedUnit, StateBytes, UnitShape};

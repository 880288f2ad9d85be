//! What the caller decides before the first byte is placed.

use std::path::PathBuf;

use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_storage::EngineKind;

/// Where the live weights of a unit are at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightHome {
    /// Always under the unit's window, in host memory.
    Host,
    /// On disk; under the window only while the unit is gathered.
    Disk,
    /// In memory that belongs to the caller and is lent for the time of a step.
    Borrowed,
}

/// Where the optimizer state of a unit is at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateHome {
    /// In host memory.
    Host,
    /// On disk; in the staging ring only while its tile is updated.
    Disk,
}

/// One unit, as the caller describes it.
#[derive(Clone, Debug)]
pub struct UnitSpec {
    /// Name for messages.
    pub name: String,
    /// Its parameters, in the caller's order.
    pub params: Vec<ParamShape>,
    /// Home of the weights.
    pub weights: WeightHome,
    /// Home of the optimizer state.
    pub state: StateHome,
}

/// Everything else the core needs to know.
pub struct Settings {
    /// Hard limit of payload bytes; `None` for no limit.
    pub limit: Option<u64>,
    /// Compute threads.
    pub threads: usize,
    /// Dtype of the live weights.
    pub compute: Dtype,
    /// Format of the optimizer state.
    pub format: Format,
    /// Dtype in which gradients are kept and accumulated.
    pub grad: Dtype,
    /// Elements in a tile, a multiple of 2048.
    pub tile_elements: u64,
    /// Bytes of the staging ring.
    pub staging_bytes: u64,
    /// Bytes of physical memory for units at home on disk.
    pub gathered_bytes: u64,
    /// The I/O engine.
    pub engine: EngineKind,
    /// Operations in flight at most.
    pub queue_depth: usize,
    /// Directories that share the disk traffic; empty when nothing is at home on disk.
    pub directories: Vec<PathBuf>,
    /// Name of this run's folder inside them.
    pub job: String,
}

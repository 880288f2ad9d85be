//! Where the live weights of one unit are, and which moves are allowed.

use zeroxide_layout::Dtype;
use zeroxide_memory::{Lease, Window};

/// A parameter that belongs to the caller, lent for the time of one step.
pub struct Lent {
    /// The live weight, in the compute dtype.
    pub weight: Lease,
    /// Its gradient.
    pub grad: Lease,
    /// Dtype of the gradient.
    pub grad_dtype: Dtype,
}

/// Residence of weights whose home is the disk.
#[derive(Debug)]
pub(crate) enum Residence {
    /// Only on disk. The window is inaccessible.
    Away,
    /// Frames lie under the window and reads into them are in flight.
    Arriving {
        /// Reads not yet completed.
        pending: usize,
        /// The first failure among those that completed.
        failed: Option<zeroxide_storage::StorageError>,
    },
    /// Frames lie under the window, and a step reads and updates its tiles there one after the other.
    Updating,
    /// Under the window and equal to the bytes on disk, or to those on their way there.
    Here {
        /// In use: the frames must not be taken.
        pinned: bool,
        /// Clock value of the last use; the smallest is reclaimed first.
        used: u64,
    },
}

/// The live weights of a unit.
pub(crate) enum Weights {
    /// At home in host memory, under the window for good.
    Host {
        /// The range they lie in.
        window: Window,
    },
    /// At home on disk.
    Disk {
        /// The range they appear in.
        window: Window,
        /// Where they are now.
        residence: Residence,
    },
    /// The caller's memory, present while a step runs.
    Borrowed {
        /// What the caller lent.
        lent: Option<Lent>,
    },
}

impl Weights {
    /// The window, where there is one.
    pub(crate) fn window(&self) -> Option<&Window> {
        match self {
            Weights::Host { window } | Weights::Disk { window, .. } => Some(window),
            Weights::Borrowed { .. } => None,
        }
    }

    /// Whether the bytes can be read and written in memory now.
    pub(crate) fn in_memory(&self) -> bool {
        match self {
            Weights::Host { .. } => true,
            Weights::Disk { residence, .. } => matches!(residence, Residence::Here { .. }),
            Weights::Borrowed { lent } => lent.is_some(),
        }
    }

    /// Whether a new value must also be written to disk.
    pub(crate) fn on_disk(&self) -> bool {
        matches!(self, Weights::Disk { .. })
    }
}

//! Where the live weights of one unit are, and which moves are allowed.

use std::ops::{Deref, DerefMut, Range};

use zeroxide_layout::Dtype;
use zeroxide_memory::{Lease, Window};

use crate::core::byte_range;
use crate::error::Result;

/// A parameter that belongs to the caller, lent for the time of one step.
pub struct Lent {
    /// The live weight, in the compute dtype.
    pub weight: Lease,
    /// Its gradient.
    pub grad: Lease,
    /// Dtype of the gradient.
    pub grad_dtype: Dtype,
}

/// Residence of weights that move: their home is the disk, or this rank's shard in host memory.
#[derive(Debug)]
pub(crate) enum Residence {
    /// Only at home. The window is inaccessible.
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
        /// The other ranks' shards are there, too, and none is older than this rank's.
        all_shards_valid: bool,
        /// In use: the frames must not be taken.
        pinned: bool,
        /// Clock value of the last use; the smallest is reclaimed first.
        used: u64,
    },
}

/// The live weights of a unit.
pub(crate) enum UnitWeights {
    /// At home in host memory, under the window for good.
    Host {
        /// The range they lie in.
        window: Window,
        /// The other ranks' shards are as new as this rank's.
        all_shards_valid: bool,
    },
    /// At home elsewhere: this rank's shard on disk or in other host memory.
    Moving {
        /// The range they appear in.
        window: Window,
        /// Where they are now.
        residence: Residence,
        /// Somebody may read the window unannounced: what is not complete must not lie under it.
        covered: bool,
        /// This rank's shard, where that is at home in host memory; `None` for the disk.
        home: Option<Lease>,
    },
    /// On the device that computes: the caller has them, laid out as the window, which stays empty.
    Away {
        /// The range that no memory lies in.
        window: Window,
    },
    /// The caller's memory, present while a step runs.
    Borrowed {
        /// What the caller lent.
        lent: Option<Lent>,
    },
}

impl UnitWeights {
    /// The window, where there is one.
    pub(crate) fn window(&self) -> Option<&Window> {
        match self {
            UnitWeights::Host { window, .. }
            | UnitWeights::Moving { window, .. }
            | UnitWeights::Away { window } => Some(window),
            UnitWeights::Borrowed { .. } => None,
        }
    }

    /// Whether this rank's bytes can be read and written in memory now.
    pub(crate) fn in_memory(&self) -> bool {
        match self {
            UnitWeights::Host { .. } | UnitWeights::Moving { home: Some(_), .. } => true,
            UnitWeights::Moving { residence, .. } => matches!(residence, Residence::Here { .. }),
            UnitWeights::Borrowed { lent } => lent.is_some(),
            UnitWeights::Away { .. } => false,
        }
    }

    /// Whether a new value must also be written to disk.
    pub(crate) fn on_disk(&self) -> bool {
        matches!(self, UnitWeights::Moving { home: None, .. })
    }

    /// Elements `range` of this rank's shard, `base` being where the shard starts in the unit, leased or borrowed for
    /// an
    /// update. `None` when they are not in memory, or the caller's.
    pub(crate) fn shard_bytes(
        &mut self,
        base: u64,
        range: &Range<u64>,
        element: usize,
    ) -> Result<Option<ShardBytes<'_>>> {
        if !self.in_memory() {
            return Ok(None);
        }
        Ok(match self {
            UnitWeights::Borrowed { .. } | UnitWeights::Away { .. } => None,
            UnitWeights::Moving {
                home: Some(lease), ..
            } => Some(ShardBytes::Home(&mut lease[byte_range(range, element)])),
            UnitWeights::Host { window, .. } | UnitWeights::Moving { window, .. } => {
                let flat = base + range.start..base + range.end;
                Some(ShardBytes::Window(
                    window.lease(byte_range(&flat, element))?,
                ))
            }
        })
    }
}

/// Bytes of a shard's weights in memory.
pub(crate) enum ShardBytes<'a> {
    /// Under the unit's window.
    Window(Lease),
    /// At home beside it.
    Home(&'a mut [u8]),
}

impl Deref for ShardBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            ShardBytes::Window(lease) => lease,
            ShardBytes::Home(bytes) => bytes,
        }
    }
}

impl DerefMut for ShardBytes<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            ShardBytes::Window(lease) => lease,
            ShardBytes::Home(bytes) => bytes,
        }
    }
}

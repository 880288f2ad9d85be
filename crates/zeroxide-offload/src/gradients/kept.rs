//! Where the gradients are that a rank keeps of a unit until the step.

use zeroxide_layout::StateKey;
use zeroxide_memory::Lease;

/// Name of the block of gradients, as messages have it.
pub(crate) const GRADIENT: StateKey = StateKey::new("gradient");

/// The gradients that this rank keeps of a unit.
pub(crate) enum KeptGradients {
    /// There are none: nothing is trained here, the caller lends them, or has them on its device.
    None,
    /// At home in host memory.
    Host(Lease),
    /// At home on disk, or nowhere but in their update. Since the last one none has arrived: neither the disk nor memory
    /// has any.
    Missing,
    /// The same, and in memory: being accumulated, or waiting for the update. What is on disk is older.
    Here(Lease),
    /// At home on disk, and there or on the way there.
    Spilled,
}

impl KeptGradients {
    /// All of them, where they are in memory.
    pub(crate) fn bytes(&self) -> Option<&Lease> {
        match self {
            Self::Host(lease) | Self::Here(lease) => Some(lease),
            Self::None | Self::Missing | Self::Spilled => None,
        }
    }

    /// All of them to be written, where they are in memory.
    pub(crate) fn bytes_mut(&mut self) -> Option<&mut Lease> {
        match self {
            Self::Host(lease) | Self::Here(lease) => Some(lease),
            Self::None | Self::Missing | Self::Spilled => None,
        }
    }

    /// Whether they are on disk alone.
    pub(crate) const fn is_spilled(&self) -> bool {
        matches!(self, Self::Spilled)
    }
}

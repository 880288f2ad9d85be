//! Names of blocks.

use std::fmt;

use crate::StateKey;

/// One state tensor of one unit's shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct BlockId {
    /// Index of the unit.
    pub unit: u32,
    /// Which tensor of the state.
    pub key: StateKey,
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unit {} {}", self.unit, self.key)
    }
}

//! Assigning byte ranges of one address space to blocks.

use std::collections::HashMap;
use std::fmt;

use crate::{LayoutError, PAGE, StateKey, checked_align_up};

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

/// A byte range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Extent {
    /// First byte; a multiple of [`PAGE`].
    pub offset: u64,
    /// Bytes the block asked for, without the padding to the next page.
    pub bytes: u64,
}

impl Extent {
    /// One past the last byte of the block, padding not included.
    pub fn end(self) -> u64 {
        self.offset + self.bytes
    }
}

/// The extents of a list of blocks: page-aligned, in the order listed, none overlapping another.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExtentMap {
    extents: Vec<(BlockId, Extent)>,
    index: HashMap<BlockId, usize>,
    total_bytes: u64,
}

impl ExtentMap {
    /// Assigns an extent to each (block, bytes), starting at offset 0.
    ///
    /// # Errors
    /// [`LayoutError::DuplicateBlock`] when a block is listed twice, [`LayoutError::TooLarge`] when the
    /// end of the space does not fit a file offset.
    pub fn new(blocks: &[(BlockId, u64)]) -> Result<Self, LayoutError> {
        let mut map = Self::default();
        for &(block, bytes) in blocks {
            let extent = Extent {
                offset: map.total_bytes,
                bytes,
            };
            if map.index.insert(block, map.extents.len()).is_some() {
                return Err(LayoutError::DuplicateBlock { block });
            }
            map.total_bytes = extent
                .offset
                .checked_add(bytes)
                .and_then(|end| checked_align_up(end, PAGE as u64))
                .filter(|&end| i64::try_from(end).is_ok())
                .ok_or(LayoutError::TooLarge { what: "extent map" })?;
            map.extents.push((block, extent));
        }
        Ok(map)
    }

    /// The extent of `block`, or `None` when it was not listed.
    pub fn get(&self, block: BlockId) -> Option<Extent> {
        self.index.get(&block).map(|&at| self.extents[at].1)
    }

    /// All extents, by ascending offset.
    pub fn iter(&self) -> impl Iterator<Item = (BlockId, Extent)> + '_ {
        self.extents.iter().copied()
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether no block was listed.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Bytes of the whole space, a multiple of [`PAGE`].
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

//! Cutting a shard into tiles.

use std::ops::Range;

use crate::LayoutError;

/// Tiles and the lengths they cut are multiples of this many elements: one page of 2-byte elements.
pub const TILE_QUANTUM: u64 = 2048;

/// A length cut into tiles of equal size; the last one may be shorter.
///
/// Every tile is a multiple of [`TILE_QUANTUM`] elements, so each tile of every component starts and
/// ends on a page boundary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tiling {
    len: u64,
    tile: u64,
    count: u32,
}

impl Tiling {
    /// Cuts `len` elements into tiles of `tile` elements.
    ///
    /// # Errors
    /// [`LayoutError::TileQuantum`] when either is not a multiple of [`TILE_QUANTUM`] or the tile is 0;
    /// [`LayoutError::TooLarge`] when there would be more than `u32::MAX` tiles.
    pub fn new(len: u64, tile: u64) -> Result<Self, LayoutError> {
        for (what, got, least) in [("length", len, 0), ("tile", tile, 1)] {
            if got < least || !got.is_multiple_of(TILE_QUANTUM) {
                return Err(LayoutError::TileQuantum {
                    what,
                    got,
                    quantum: TILE_QUANTUM,
                });
            }
        }
        let count = u32::try_from(len.div_ceil(tile))
            .map_err(|_| LayoutError::TooLarge { what: "tile count" })?;
        Ok(Self { len, tile, count })
    }

    /// Elements in all tiles together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing to cut.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of every tile but the last.
    pub fn tile(&self) -> u64 {
        self.tile
    }

    /// Number of tiles.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The elements of tile `index`.
    ///
    /// # Panics
    /// When `index` is not below [`count`](Self::count).
    pub fn range(&self, index: u32) -> Range<u64> {
        assert!(index < self.count, "tile {index} of {}", self.count);
        let start = u64::from(index) * self.tile;
        start..self.len.min(start.saturating_add(self.tile))
    }

    /// The tile that holds `element`.
    ///
    /// # Panics
    /// When `element` is not below [`len`](Self::len).
    pub fn tile_of(&self, element: u64) -> u32 {
        assert!(element < self.len, "element {element} of {}", self.len);
        u32::try_from(element / self.tile).expect("the tile count was checked at construction")
    }
}

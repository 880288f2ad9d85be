//! Tiles of blocks on their way to and from the disk: the one place that reads, writes and verifies them.
//!
//! Every completion is looked at, and no call returns while a request of its own is in flight: its buffer may be under a
//! window that moves next.

use std::ops::Range;
use std::sync::mpsc::channel;

use zeroxide_layout::{BlockId, PAGE, StateTensor, Tiling};
use zeroxide_memory::Lease;
use zeroxide_optim::Pool;
use zeroxide_storage::{Reply, StorageError};

use crate::core::{byte_range, to_usize};
use crate::disk::Disk;
use crate::error::Result;
use crate::unit::Unit;

/// One tile of a block, and the memory it comes from or goes to.
pub(crate) struct TileBuffer {
    pub(crate) id: BlockId,
    pub(crate) tile: u32,
    pub(crate) bytes: Lease,
}

/// This rank's weights under the unit's window, tile by tile, as they go to or come from their block `id`.
pub(crate) fn weight_buffers(
    unit: &Unit,
    id: BlockId,
) -> impl Iterator<Item = Result<TileBuffer>> + '_ {
    let element = unit.tensors.compute().size();
    (0..unit.weight_tiles.count()).map(move |tile| {
        let window = unit
            .weights
            .window()
            .expect("weights on disk have a window");
        let flat = unit.flat(&unit.weight_tiles.range(tile));
        let bytes = window.lease(byte_range(&flat, element))?;
        Ok(TileBuffer { id, tile, bytes })
    })
}

/// Bytes of a tile of a state tensor on its way to or from the disk: its elements, and what is left of their last page.
pub(crate) fn tile_bytes(tensor: &StateTensor, elements: &Range<u64>) -> usize {
    to_usize(tensor.disk_bytes(elements.end - elements.start))
}

/// The tiles that hold `elements` of a block: (tile, elements within it, where they start counted from the first of
/// `elements`).
pub(crate) fn tiles_with(
    tiles: Tiling,
    elements: Range<u64>,
) -> impl Iterator<Item = (u32, Range<u64>, usize)> {
    let mut at = elements.start;
    std::iter::from_fn(move || {
        (at < elements.end).then(|| {
            let tile = tiles.tile_of(at);
            let whole = tiles.range(tile);
            let end = whole.end.min(elements.end);
            let inside = at - whole.start..end - whole.start;
            let first = to_usize(at - elements.start);
            at = end;
            (tile, inside, first)
        })
    })
}

impl Disk {
    /// Starts reading a tile; the completion, tagged `tag`, comes to `replies`, and whoever takes it has it verified.
    pub(crate) fn start_read(
        &self,
        buffer: TileBuffer,
        tag: u64,
        replies: impl Into<Reply>,
    ) -> std::result::Result<(), StorageError> {
        let TileBuffer { id, tile, bytes } = buffer;
        self.store
            .start_read(id, tile, bytes, tag, replies)
            .map_err(|(error, _)| error)
    }

    /// Starts writing a tile; the completion, tagged `tag`, comes to `replies`. `checksum` is that of its bytes, where
    /// the caller has it already.
    pub(crate) fn start_write(
        &self,
        buffer: TileBuffer,
        checksum: Option<u64>,
        tag: u64,
        replies: impl Into<Reply>,
    ) -> std::result::Result<(), StorageError> {
        let TileBuffer { id, tile, bytes } = buffer;
        let started = match checksum {
            Some(crc) => self
                .store
                .start_write_with_crc(id, tile, bytes, crc, tag, replies),
            None => self.store.start_write(id, tile, bytes, tag, replies),
        };
        started.map_err(|(error, _)| error)
    }

    /// Reads a tile of `bytes` bytes into the staging ring, and verifies it.
    pub(crate) fn read_tile(&self, id: BlockId, tile: u32, bytes: usize) -> Result<Lease> {
        let bytes = self.ring.lease(bytes, PAGE)?;
        let (sender, receiver) = channel();
        self.start_read(TileBuffer { id, tile, bytes }, 0, &sender)?;
        let read = self.receive(&receiver)?;
        read.result?;
        self.store.verify(id, tile, &read.buffer)?;
        Ok(read.buffer)
    }

    /// Writes tiles and waits for all of them; after an error no further one is begun. The first error counts.
    pub(crate) fn write_tiles(
        &self,
        tiles: impl IntoIterator<Item = Result<TileBuffer>>,
    ) -> Result<()> {
        let (sender, receiver) = channel();
        let mut in_flight = 0_u32;
        let mut outcome = Ok(());
        for tile in tiles {
            let started = tile.and_then(|tile| Ok(self.start_write(tile, None, 0, &sender)?));
            if started.is_err() {
                outcome = started;
                break;
            }
            in_flight += 1;
        }
        for _ in 0..in_flight {
            let written = self.receive(&receiver)?.result;
            if written.is_err() {
                self.store.lose();
            }
            if outcome.is_ok() {
                outcome = written.map_err(Into::into);
            }
        }
        outcome
    }

    /// Writes all tiles of a block, one at a time through the staging ring; `fill` makes their bytes.
    pub(crate) fn write_block(
        &self,
        id: BlockId,
        tiles: Tiling,
        tensor: &StateTensor,
        fill: impl Fn(&mut [u8]),
    ) -> Result<()> {
        for tile in 0..tiles.count() {
            let bytes = tile_bytes(tensor, &tiles.range(tile));
            let mut bytes = self.ring.lease(bytes, PAGE)?;
            fill(&mut bytes);
            self.write_tiles([Ok(TileBuffer { id, tile, bytes })])?;
        }
        Ok(())
    }

    /// Reads, changes and writes back the tiles that hold `elements` of a block, one at a time: `edit(first, bytes)`
    /// changes elements from `first` on, counted from `elements.start`.
    pub(crate) fn edit_block(
        &self,
        id: BlockId,
        tiles: Tiling,
        tensor: &StateTensor,
        elements: &Range<u64>,
        mut edit: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        for (tile, inside, first) in tiles_with(tiles, elements.clone()) {
            let mut bytes = self.read_tile(id, tile, tile_bytes(tensor, &tiles.range(tile)))?;
            edit(first, &mut bytes[tensor.byte_range(&inside)]);
            self.write_tiles([Ok(TileBuffer { id, tile, bytes })])?;
        }
        Ok(())
    }

    /// Verifies tiles that have been read, on all threads.
    pub(crate) fn verify_tiles(&self, pool: &Pool, tiles: Vec<TileBuffer>) -> Result<()> {
        let mut outcomes: Vec<std::result::Result<(), StorageError>> = Vec::new();
        outcomes.resize_with(tiles.len(), || Ok(()));
        let tasks = tiles.into_iter().zip(&mut outcomes).collect();
        let store = &self.store;
        let verify = |_, (buffer, outcome): (TileBuffer, &mut std::result::Result<_, _>)| {
            *outcome = store.verify(buffer.id, buffer.tile, &buffer.bytes);
        };
        pool.run_each(tasks, verify);
        for outcome in outcomes {
            outcome?;
        }
        Ok(())
    }

    /// Compares the checksum of what came back of a tile with that of what was written.
    pub(crate) fn verify_checksum(
        &self,
        id: BlockId,
        tile: u32,
        checksum: u64,
    ) -> std::result::Result<(), StorageError> {
        self.store.verify_checksum(id, tile, checksum)
    }
}

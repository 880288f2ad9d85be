//! A small durable store to test with: contents of a tile follow from its place and a version.

use std::path::Path;
use std::sync::mpsc::channel;

use zeroxide_layout::BlockId;
use zeroxide_storage::{
    BlockStore, Durable, EngineKind, SimOptions, StorageError, StoreOptions, open_queue,
};

use super::stores::{MOMENT, WEIGHT};
use super::{PATIENCE, arena, lease, pattern, stores};

/// A durable store of [`stores::blocks`], made by a run of two ranks.
pub(crate) fn options(directories: &[&Path]) -> StoreOptions {
    StoreOptions {
        spare: false,
        durable: Some(Durable {
            facts: vec![("world size".into(), "2".into())],
        }),
        ..stores::options(directories, false)
    }
}

pub(crate) fn open(directories: &[&Path]) -> Result<BlockStore, StorageError> {
    BlockStore::create(options(directories))
}

/// The same on a simulated disk.
pub(crate) fn open_with(
    directories: &[&Path],
    simulation: SimOptions,
) -> Result<BlockStore, StorageError> {
    let mut options = options(directories);
    options.queue = open_queue(EngineKind::Simulated(simulation), 4)?;
    BlockStore::create(options)
}

/// (block, tile, bytes) of all tiles.
pub(crate) fn tiles(store: &BlockStore) -> Vec<(BlockId, u32, usize)> {
    [WEIGHT, MOMENT]
        .into_iter()
        .flat_map(|block| (0..store.tiles(block)).map(move |tile| (block, tile)))
        .map(|(block, tile)| (block, tile, store.tile_len(block, tile).unwrap()))
        .collect()
}

/// What a tile holds as of a version.
pub(crate) fn expected(block: BlockId, tile: u32, length: usize, version: u64) -> Vec<u8> {
    pattern(
        length,
        version * 1000 + u64::from(block.unit) * 100 + u64::from(tile) + 1,
    )
}

/// Writes a tile as of a version, and waits for it.
pub(crate) fn write(
    store: &BlockStore,
    block: BlockId,
    tile: u32,
    version: u64,
) -> Result<(), StorageError> {
    let length = store.tile_len(block, tile)?;
    let memory = arena(length);
    let mut buffer = lease(&memory, length);
    buffer.copy_from_slice(&expected(block, tile, length, version));
    let (reply, completions) = channel();
    store
        .start_write(block, tile, buffer, 0, &reply)
        .map_err(|(error, _)| error)?;
    completions.recv_timeout(PATIENCE).unwrap().result
}

/// Reads a tile and verifies it.
pub(crate) fn read(store: &BlockStore, block: BlockId, tile: u32) -> Result<Vec<u8>, StorageError> {
    let length = store.tile_len(block, tile)?;
    let memory = arena(length);
    let (reply, completions) = channel();
    store
        .start_read(block, tile, lease(&memory, length), 0, &reply)
        .map_err(|(error, _)| error)?;
    let answer = completions.recv_timeout(PATIENCE).unwrap();
    answer.result?;
    store.verify(block, tile, &answer.buffer)?;
    Ok(answer.buffer.to_vec())
}

/// A tile must be as of a version.
pub(crate) fn check(store: &BlockStore, block: BlockId, tile: u32, version: u64) {
    let found = read(store, block, tile).unwrap();
    let wanted = expected(block, tile, found.len(), version);
    assert!(found == wanted, "{block} tile {tile} is not of {version}");
}

/// Every tile must be as of a version.
pub(crate) fn check_all(store: &BlockStore, version: u64) {
    for (block, tile, _) in tiles(store) {
        check(store, block, tile, version);
    }
}

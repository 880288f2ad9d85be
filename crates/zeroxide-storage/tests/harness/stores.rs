//! A small block store to test with.

use std::path::Path;
use std::sync::Arc;

use zeroxide_layout::{BlockId, StateKey};
use zeroxide_storage::{
    BlockSpec, BlockStore, EngineKind, Queue, StorageError, StoreOptions, open_queue,
};

/// The size of a page.
pub(crate) const PAGE: usize = 4096;
/// The block of several tiles.
pub(crate) const WEIGHT: BlockId = BlockId {
    unit: 0,
    key: StateKey::WEIGHT,
};
/// The block of one tile.
pub(crate) const MOMENT: BlockId = BlockId {
    unit: 1,
    key: StateKey::new("exp_avg_sq"),
};

/// The queue a user would get.
pub(crate) fn queue() -> Arc<dyn Queue> {
    open_queue(EngineKind::Auto, 8).unwrap()
}

/// Two blocks: five tiles of two pages, the last of one; and one tile of three pages.
pub(crate) fn blocks() -> Vec<BlockSpec> {
    let page = PAGE as u64;
    vec![
        BlockSpec {
            id: WEIGHT,
            bytes: 9 * page,
            tile_bytes: 2 * page,
            committed: true,
        },
        BlockSpec {
            id: MOMENT,
            bytes: 3 * page,
            tile_bytes: 16 * page,
            committed: true,
        },
    ]
}

/// A store of [`blocks`] under the job name `job`.
pub(crate) fn options(directories: &[&Path], ephemeral: bool) -> StoreOptions {
    StoreOptions {
        directories: directories.iter().map(|path| path.to_path_buf()).collect(),
        shares: Vec::new(),
        job: "job".into(),
        blocks: blocks(),
        queue: queue(),
        ephemeral,
        spare: false,
        durable: None,
    }
}

/// An ephemeral store in one directory.
pub(crate) fn create(directory: &Path) -> Result<BlockStore, StorageError> {
    BlockStore::create(options(&[directory], true))
}

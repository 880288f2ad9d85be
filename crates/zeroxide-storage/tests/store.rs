//! The block store: tiles over several directories, and every one of them verified.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use harness::stores::{MOMENT, PAGE, WEIGHT, create, options};
use harness::{PATIENCE, arena, fill, lease, pattern};
use zeroxide_layout::{BlockId, StateKey};
use zeroxide_memory::{Arena, Lease};
use zeroxide_storage::{BlockStore, Completion, StorageError, checksum};

fn write(store: &BlockStore, block: BlockId, tile: u32, buffer: Lease) -> Lease {
    let (reply, completions) = channel();
    store
        .start_write(block, tile, buffer, 4, &reply)
        .map_err(|(error, _)| error)
        .unwrap();
    let Completion {
        buffer,
        result,
        tag,
        ..
    } = completions.recv_timeout(PATIENCE).unwrap();
    assert_eq!(tag, 4);
    result.unwrap();
    buffer
}

fn read(store: &BlockStore, block: BlockId, tile: u32, buffer: Lease) -> Lease {
    let (reply, completions) = channel();
    store
        .start_read(block, tile, buffer, 4, &reply)
        .map_err(|(error, _)| error)
        .unwrap();
    let Completion { buffer, result, .. } = completions.recv_timeout(PATIENCE).unwrap();
    result.unwrap();
    buffer
}

/// Every tile of the store with its length, in order.
fn tiles(store: &BlockStore) -> Vec<(BlockId, u32, usize)> {
    [WEIGHT, MOMENT]
        .into_iter()
        .flat_map(|block| {
            (0..store.tiles(block))
                .map(move |tile| (block, tile, store.tile_len(block, tile).unwrap()))
        })
        .collect()
}

fn write_all(store: &BlockStore, arena: &Arena) {
    for (seed, (block, tile, length)) in (1..).zip(tiles(store)) {
        let mut buffer = lease(arena, length);
        fill(&mut buffer, seed);
        drop(write(store, block, tile, buffer));
    }
}

#[test]
fn tiles_come_back_verified_from_one_directory_and_from_three() {
    for count in [1, 3] {
        let roots: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
        let paths: Vec<&Path> = roots.iter().map(tempfile::TempDir::path).collect();
        let store = BlockStore::create(options(&paths, true)).unwrap();
        assert_eq!((store.tiles(WEIGHT), store.tiles(MOMENT)), (5, 1));
        assert_eq!(store.tile_len(WEIGHT, 4).unwrap(), PAGE);
        assert_eq!(store.bytes(), 12 * PAGE as u64);
        assert_eq!(store.directories().count(), count);
        let on_disk: u64 = store.files().iter().map(|file| file.bytes()).sum();
        assert_eq!(on_disk, store.bytes());
        let arena = arena(1 << 20);
        write_all(&store, &arena);
        for (seed, (block, tile, length)) in (1..).zip(tiles(&store)) {
            let buffer = read(&store, block, tile, lease(&arena, length));
            assert!(*buffer == *pattern(length, seed), "{block} tile {tile}");
            store.verify(block, tile, &buffer).unwrap();
        }
        // Overwriting replaces the checksum too, also one that was computed elsewhere.
        let (reply, completions) = channel();
        let mut buffer = lease(&arena, 2 * PAGE);
        fill(&mut buffer, 99);
        let crc = checksum(&buffer);
        store
            .start_write_with_crc(WEIGHT, 1, buffer, crc, 0, &reply)
            .unwrap();
        completions.recv_timeout(PATIENCE).unwrap().result.unwrap();
        let buffer = read(&store, WEIGHT, 1, lease(&arena, 2 * PAGE));
        store.verify(WEIGHT, 1, &buffer).unwrap();
        store.close().unwrap();
    }
}

#[test]
fn a_tile_changed_on_disk_is_named_with_both_checksums() {
    let root = tempfile::tempdir().unwrap();
    let store = create(root.path()).unwrap();
    let arena = arena(1 << 20);
    write_all(&store, &arena);
    let path = store.files()[0].path().to_path_buf();
    // The last byte of the second tile, and nothing else.
    let mut raw = fs::OpenOptions::new().write(true).open(&path).unwrap();
    raw.seek(SeekFrom::Start(4 * PAGE as u64 - 1)).unwrap();
    raw.write_all(&[pattern(2 * PAGE, 2)[2 * PAGE - 1] ^ 0x10])
        .unwrap();
    raw.sync_all().unwrap();
    for (block, tile, length) in tiles(&store) {
        let buffer = read(&store, block, tile, lease(&arena, length));
        let outcome = store.verify(block, tile, &buffer);
        if (block, tile) != (WEIGHT, 1) {
            outcome.unwrap();
            continue;
        }
        match outcome.unwrap_err() {
            StorageError::Corrupt {
                path: named,
                offset,
                expected,
                got,
                ..
            } => {
                assert_eq!((named, offset), (path.clone(), 2 * PAGE as u64));
                assert_eq!(
                    (expected, got),
                    (checksum(&pattern(2 * PAGE, 2)), checksum(&buffer))
                );
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn what_was_never_written_is_an_error_not_zeros() {
    let root = tempfile::tempdir().unwrap();
    let store = create(root.path()).unwrap();
    let arena = arena(1 << 20);
    let (reply, _completions) = channel();
    let (error, buffer) = store
        .start_read(WEIGHT, 0, lease(&arena, 2 * PAGE), 0, &reply)
        .unwrap_err();
    assert!(
        matches!(
            error,
            StorageError::NeverWritten {
                block: WEIGHT,
                tile: 0,
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(
        store.verify(WEIGHT, 0, &buffer).unwrap_err(),
        StorageError::NeverWritten { .. }
    ));
}

#[test]
fn wrong_tiles_and_lengths_come_back_with_the_buffer() {
    let root = tempfile::tempdir().unwrap();
    let store = create(root.path()).unwrap();
    let arena = arena(1 << 20);
    let (reply, _completions) = channel();
    let absent = BlockId {
        unit: 7,
        key: StateKey::WEIGHT,
    };
    assert_eq!(store.tiles(absent), 0);
    for (block, tile, tiles) in [(WEIGHT, 5, 5), (absent, 0, 0)] {
        let (error, buffer) = store
            .start_write(block, tile, lease(&arena, PAGE), 0, &reply)
            .unwrap_err();
        assert_eq!(buffer.len(), PAGE);
        assert!(
            matches!(error, StorageError::UnknownTile { tiles: t, .. } if t == tiles),
            "{error}"
        );
        assert!(store.tile_len(block, tile).is_err());
    }
    let (error, _) = store
        .start_write(WEIGHT, 0, lease(&arena, PAGE), 0, &reply)
        .unwrap_err();
    assert!(
        matches!(
            error,
            StorageError::TileLength {
                expected: 8192,
                got: 4096,
                ..
            }
        ),
        "{error}"
    );
}

/// The checksum of a tile stays that of what is on disk when the queue refuses the next write.
#[test]
fn a_refused_write_leaves_the_tile_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let options = options(&[root.path()], true);
    let queue = Arc::clone(&options.queue);
    let store = BlockStore::create(options).unwrap();
    let arena = arena(1 << 20);
    write_all(&store, &arena);
    let before = pattern(2 * PAGE, 1);
    store.verify(WEIGHT, 0, &before).unwrap();
    queue.close();
    let mut buffer = lease(&arena, 2 * PAGE);
    fill(&mut buffer, 1000);
    let (reply, _completions) = channel();
    let (error, _) = store.start_write(WEIGHT, 0, buffer, 0, &reply).unwrap_err();
    assert!(matches!(error, StorageError::Closed), "{error}");
    store.verify(WEIGHT, 0, &before).unwrap();
}

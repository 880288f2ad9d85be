//! Faults of a simulated disk: each ends in a whole transfer or in an error that names it.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::{Client, arena, fill, lease, pattern};
use zeroxide_layout::{BlockId, StateKey};
use zeroxide_storage::{
    BlockSpec, BlockStore, Completion, DiskFile, EngineKind, Fault, FaultRule, OpKind, Queue,
    SimBacking, SimOptions, StorageError, StoreOptions, Trigger, open_queue,
};

const PAGE: usize = 4096;

fn queue(faults: Vec<FaultRule>) -> Arc<dyn Queue> {
    open_queue(
        EngineKind::Simulated(SimOptions {
            faults,
            ..SimOptions::default()
        }),
        4,
    )
    .unwrap()
}

fn rule(kind: OpKind, when: Trigger, fault: Fault) -> FaultRule {
    FaultRule {
        kind: Some(kind),
        when,
        fault,
    }
}

fn file(pages: usize) -> (tempfile::TempDir, Arc<DiskFile>) {
    let directory = tempfile::tempdir().unwrap();
    let file = DiskFile::create(directory.path().join("data"), (pages * PAGE) as u64).unwrap();
    (directory, file)
}

#[test]
fn an_io_error_names_operation_file_place_and_cause() {
    let (_directory, file) = file(8);
    let arena = arena(8 * PAGE);
    for (kind, op) in [(OpKind::Read, "read"), (OpKind::Write, "write")] {
        let queue = queue(vec![rule(kind, Trigger::Nth(1), Fault::Errno(libc::EIO))]);
        let client = Client::new(&*queue);
        client.run(kind, &file, 0, lease(&arena, PAGE)).1.unwrap();
        let (buffer, result) = client.run(kind, &file, 4096, lease(&arena, 2 * PAGE));
        let message = result.unwrap_err().to_string();
        for part in [
            op,
            "8192 bytes",
            "offset 4096",
            file.path().to_str().unwrap(),
            "os error 5",
        ] {
            assert!(
                message.contains(part),
                "{part:?} is missing from {message:?}"
            );
        }
        assert_eq!(buffer.len(), 2 * PAGE, "the buffer comes back");
        client.run(kind, &file, 0, lease(&arena, PAGE)).1.unwrap();
        assert_eq!(queue.counters().of(kind).failed, 1);
        assert_eq!(queue.counters().of(kind).bytes, 2 * PAGE as u64);
    }
}

#[test]
fn an_error_after_a_part_says_how_far_it_came() {
    let (_directory, file) = file(8);
    let arena = arena(8 * PAGE);
    let queue = queue(vec![
        rule(OpKind::Read, Trigger::Nth(0), Fault::Short(3 * PAGE)),
        rule(
            OpKind::Read,
            Trigger::Offset(7 * PAGE as u64),
            Fault::Errno(libc::EIO),
        ),
    ]);
    let client = Client::new(&*queue);
    let error = client
        .run(OpKind::Read, &file, 0, lease(&arena, 8 * PAGE))
        .1
        .unwrap_err();
    match error {
        StorageError::Io {
            done,
            length,
            offset: 0,
            ..
        } => {
            assert_eq!((done, length), (3 * PAGE, 8 * PAGE));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_full_disk_is_not_just_any_io_error() {
    let (_directory, file) = file(4);
    let arena = arena(4 * PAGE);
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        let queue = queue(vec![rule(
            OpKind::Write,
            Trigger::Nth(0),
            Fault::Errno(errno),
        )]);
        let client = Client::new(&*queue);
        let error = client
            .run(OpKind::Write, &file, 0, lease(&arena, 4 * PAGE))
            .1
            .unwrap_err();
        assert!(
            matches!(error, StorageError::NoSpace { need: 16384, .. }),
            "{error}"
        );
    }
}

#[test]
fn interruptions_are_retried_and_short_pieces_resumed() {
    let (_directory, file) = file(8);
    let arena = arena(8 * PAGE);
    for kind in [OpKind::Read, OpKind::Write] {
        let faults = vec![
            rule(kind, Trigger::Nth(0), Fault::Errno(libc::EINTR)),
            rule(kind, Trigger::Nth(1), Fault::Short(PAGE)),
            rule(kind, Trigger::Nth(2), Fault::Errno(libc::EAGAIN)),
            // Between two sectors: a direct transfer goes on from the last whole one.
            rule(kind, Trigger::Nth(3), Fault::Short(PAGE + 700)),
        ];
        let backing = SimBacking::Memory;
        let options = SimOptions {
            faults,
            backing,
            ..SimOptions::default()
        };
        let queue = open_queue(EngineKind::Simulated(options), 4).unwrap();
        let client = Client::new(&*queue);
        let mut buffer = lease(&arena, 8 * PAGE);
        fill(&mut buffer, 5);
        let (buffer, result) = client.run(OpKind::Write, &file, 0, buffer);
        result.unwrap();
        let (buffer, result) = client.run(OpKind::Read, &file, 0, buffer);
        result.unwrap();
        assert!(*buffer == *pattern(8 * PAGE, 5), "{kind}");
        assert_eq!(queue.counters().of(kind).bytes, 8 * PAGE as u64);
    }
}

#[test]
fn interruptions_without_end_are_an_error() {
    let (_directory, file) = file(1);
    let arena = arena(PAGE);
    let queue = queue(vec![rule(
        OpKind::Read,
        Trigger::From(0),
        Fault::Errno(libc::EINTR),
    )]);
    let client = Client::new(&*queue);
    let error = client
        .run(OpKind::Read, &file, 0, lease(&arena, PAGE))
        .1
        .unwrap_err();
    assert!(error.to_string().contains("os error 4"), "{error}");
}

#[test]
fn a_transfer_of_nothing_is_not_a_success() {
    let (_directory, file) = file(4);
    let arena = arena(4 * PAGE);
    for kind in [OpKind::Read, OpKind::Write] {
        let queue = queue(vec![rule(kind, Trigger::Nth(0), Fault::Short(0))]);
        let client = Client::new(&*queue);
        let error = client
            .run(kind, &file, 0, lease(&arena, 4 * PAGE))
            .1
            .unwrap_err();
        assert!(
            matches!(error, StorageError::ShortTransfer { got: 0, .. }),
            "{error}"
        );
    }
}

#[test]
fn a_panicking_engine_answers_everything_and_closes() {
    let (_directory, file) = file(16);
    let arena = arena(16 * PAGE);
    let queue = queue(vec![rule(OpKind::Read, Trigger::Nth(3), Fault::Panic)]);
    let client = Client::new(&*queue);
    let mut accepted = 0;
    for tag in 0..16 {
        let operation = client.operation(
            OpKind::Read,
            &file,
            tag * PAGE as u64,
            lease(&arena, PAGE),
            tag,
        );
        match queue.submit(operation) {
            Ok(()) => accepted += 1,
            Err((error, _)) => assert!(matches!(error, StorageError::Closed), "{error}"),
        }
    }
    let results: Vec<_> = (0..accepted).map(|_| client.next().result).collect();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 3);
    assert!(
        results
            .iter()
            .filter_map(|r| r.as_ref().err())
            .all(|e| matches!(e, StorageError::Closed))
    );
    queue.close();
    assert_eq!(arena.free().unwrap(), arena.capacity());
}

#[test]
fn a_reordering_disk_reorders_and_loses_nothing() {
    let (_directory, file) = file(64);
    let arena = arena(64 * PAGE);
    let options = SimOptions {
        seed: 1,
        reorder: true,
        // Longer than submitting takes, so that all are in flight before the first ends.
        latency: Duration::from_millis(30)..Duration::from_millis(31),
        backing: SimBacking::Memory,
        ..SimOptions::default()
    };
    let queue = open_queue(EngineKind::Simulated(options), 64).unwrap();
    let client = Client::new(&*queue);
    for tag in 0..64 {
        client.start(
            OpKind::Read,
            &file,
            tag * PAGE as u64,
            lease(&arena, PAGE),
            tag,
        );
    }
    let mut tags: Vec<u64> = (0..64).map(|_| client.next().tag).collect();
    assert!(!tags.is_sorted(), "nothing was reordered");
    tags.sort_unstable();
    assert!(tags.into_iter().eq(0..64));
}

/// A store of one block of four tiles on a simulated disk, all tiles written.
fn written_store(faults: Vec<FaultRule>) -> (tempfile::TempDir, BlockStore, Vec<Completion>) {
    let directory = tempfile::tempdir().unwrap();
    let store = BlockStore::create(StoreOptions {
        directories: vec![directory.path().to_path_buf()],
        shares: Vec::new(),
        job: "job".into(),
        blocks: vec![BlockSpec {
            id: BLOCK,
            bytes: 8 * PAGE as u64,
            tile_bytes: 2 * PAGE as u64,
            committed: true,
        }],
        queue: queue(faults),
        ephemeral: true,
        spare: false,
        durable: None,
    })
    .unwrap();
    let arena = arena(8 * PAGE);
    let (reply, completions) = std::sync::mpsc::channel();
    for tile in 0..4 {
        let mut buffer = lease(&arena, 2 * PAGE);
        fill(&mut buffer, u64::from(tile) + 1);
        store
            .start_write(BLOCK, tile, buffer, u64::from(tile), &reply)
            .unwrap();
    }
    let mut answers: Vec<_> = (0..4)
        .map(|_| completions.recv_timeout(harness::PATIENCE).unwrap())
        .collect();
    answers.sort_by_key(|answer| answer.tag);
    (directory, store, answers)
}

const BLOCK: BlockId = BlockId {
    unit: 2,
    key: StateKey::new("exp_avg"),
};

/// Reads and verifies every tile; the indices of those that fail.
fn corrupt_tiles(store: &BlockStore) -> Vec<u32> {
    let arena = arena(2 * PAGE);
    let (reply, completions) = std::sync::mpsc::channel();
    let mut corrupt = Vec::new();
    for tile in 0..4 {
        store
            .start_read(BLOCK, tile, lease(&arena, 2 * PAGE), 0, &reply)
            .unwrap();
        let Completion { buffer, result, .. } =
            completions.recv_timeout(harness::PATIENCE).unwrap();
        result.unwrap();
        match store.verify(BLOCK, tile, &buffer) {
            Ok(()) => assert!(*buffer == *pattern(2 * PAGE, u64::from(tile) + 1)),
            Err(StorageError::Corrupt {
                block,
                tile: named,
                expected,
                got,
                ..
            }) => {
                assert_eq!((block, named), (BLOCK, tile));
                assert_ne!(expected, got);
                corrupt.push(tile);
            }
            Err(other) => panic!("{other}"),
        }
    }
    corrupt
}

#[test]
fn a_torn_write_and_a_flipped_bit_are_found_when_the_tile_comes_back() {
    let (_directory, store, answers) = written_store(vec![
        rule(
            OpKind::Write,
            Trigger::Offset(2 * PAGE as u64),
            Fault::Torn(PAGE),
        ),
        rule(
            OpKind::Write,
            Trigger::Offset(6 * PAGE as u64),
            Fault::FlipBit,
        ),
    ]);
    assert!(
        answers.iter().all(|answer| answer.result.is_ok()),
        "the disk lied: nobody knows yet"
    );
    let untouched = pattern(2 * PAGE, 4);
    assert!(
        *answers[3].buffer == *untouched,
        "the written buffer is as its owner left it"
    );
    assert_eq!(corrupt_tiles(&store), [1, 3]);
}

#[test]
fn a_bit_flipped_while_reading_is_found() {
    let (_directory, store, _) =
        written_store(vec![rule(OpKind::Read, Trigger::Nth(2), Fault::FlipBit)]);
    assert_eq!(corrupt_tiles(&store), [2]);
    assert_eq!(
        corrupt_tiles(&store),
        [0_u32; 0],
        "the disk itself is sound"
    );
}

#[test]
fn a_tile_whose_write_failed_does_not_verify() {
    let (_directory, store, answers) = written_store(vec![rule(
        OpKind::Write,
        Trigger::Nth(0),
        Fault::Errno(libc::EIO),
    )]);
    assert!(answers[0].result.is_err());
    assert_eq!(corrupt_tiles(&store), [0]);
}

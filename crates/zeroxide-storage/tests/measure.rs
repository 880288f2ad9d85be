//! What a measurement of a disk moves, and what it leaves behind.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::time::Duration;

use harness::{arena, lease};
use zeroxide_storage::{StorageError, measure_disk};

const MIB: usize = 1 << 20;
const PATIENT: Duration = Duration::from_mins(1);

#[test]
fn all_is_written_and_read_and_nothing_stays() {
    let directory = tempfile::tempdir().unwrap();
    let arena = arena(4 * MIB);
    let buffers = (0..4).map(|_| lease(&arena, MIB)).collect();
    let found = measure_disk(directory.path(), 10 * MIB as u64 + 5, PATIENT, buffers).unwrap();
    assert_eq!(found.write.bytes, 10 * MIB as u64);
    assert_eq!(found.read.bytes, 10 * MIB as u64);
    assert!(found.write.took > Duration::ZERO && found.read.took > Duration::ZERO);
    assert!(!found.engine.is_empty());
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    assert_eq!(arena.free().unwrap(), arena.capacity());
}

#[test]
fn time_ends_it_and_what_was_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let arena = arena(2 * MIB);
    let buffers = (0..2).map(|_| lease(&arena, MIB)).collect();
    let found = measure_disk(directory.path(), 64 * MIB as u64, Duration::ZERO, buffers).unwrap();
    assert_eq!(
        found.write.bytes, MIB as u64,
        "one block is measured however little time there is"
    );
    assert_eq!(found.read.bytes, MIB as u64);
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let arena = arena(MIB);
    let missing = directory.path().join("none");
    let error =
        measure_disk(&missing, 8 * MIB as u64, PATIENT, vec![lease(&arena, MIB)]).unwrap_err();
    assert!(
        matches!(error, StorageError::MissingParent { .. }),
        "{error}"
    );
    let error = measure_disk(directory.path(), 8, PATIENT, Vec::new()).unwrap_err();
    assert!(
        matches!(error, StorageError::Depth { depth: 0, .. }),
        "{error}"
    );
}

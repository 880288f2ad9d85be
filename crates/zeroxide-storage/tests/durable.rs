//! Durable stores: what a commit names is what a later opening finds, whatever was done or went wrong in between.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use harness::committing::{check, check_all, expected, open, open_with, options, tiles, write};
use harness::stores::{MOMENT, PAGE, WEIGHT};
use harness::{arena, kill, lease, with_mount};
use zeroxide_storage::{
    BlockStore, Durable, EngineKind, Fault, FaultRule, OpKind, SimOptions, StorageError,
    StoreOptions, Trigger, open_queue,
};

/// Writes every tile as of `version`, and commits.
fn commit(store: &BlockStore, version: u64) -> u64 {
    for (block, tile, _) in tiles(store) {
        write(store, block, tile, version).unwrap();
    }
    let generation = store.prepare_commit(&format!("version {version}")).unwrap();
    store.conclude_commit().unwrap();
    generation
}

fn manifests(root: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(root.join("job"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("manifest"))
        .collect();
    found.sort();
    found
}

/// Catches: a commit that names the older version, tiles that are read from the wrong slot, a note that is lost.
#[test]
fn the_last_commit_is_found_again_and_what_came_after_is_not() {
    for directories in [1, 3] {
        let roots: Vec<_> = (0..directories)
            .map(|_| tempfile::tempdir().unwrap())
            .collect();
        let paths: Vec<&Path> = roots.iter().map(tempfile::TempDir::path).collect();
        let store = open(&paths).unwrap();
        assert_eq!((store.found(), store.generation()), (vec![], 0));
        for version in 1..4 {
            assert_eq!(commit(&store, version), version);
            assert_eq!(manifests(paths[0]).len(), 1, "of the last commit alone");
        }
        write(&store, WEIGHT, 0, 100).unwrap();
        check(&store, WEIGHT, 0, 100);
        drop(store);
        let store = open(&paths).unwrap();
        assert_eq!(store.found(), [3]);
        let found = store.adopt(3).unwrap().unwrap();
        assert_eq!((found.generation, found.note.as_str()), (3, "version 3"));
        // What the run begins with is written elsewhere, and taken back.
        for (block, tile, _) in tiles(&store) {
            write(&store, block, tile, 50).unwrap();
            check(&store, block, tile, 50);
        }
        store.roll_back().unwrap();
        check_all(&store, 3);
        assert_eq!(commit(&store, 4), 4);
        check_all(&store, 4);
    }
}

/// Catches: shares that are measured anew deciding where tiles lie that were put by others.
#[test]
fn a_store_that_is_opened_again_keeps_its_shares() {
    let roots = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let paths: Vec<&Path> = roots.iter().map(tempfile::TempDir::path).collect();
    let with = |shares: &[u64]| {
        BlockStore::create(StoreOptions {
            shares: shares.to_vec(),
            ..options(&paths)
        })
        .unwrap()
    };
    let parts =
        |store: &BlockStore| -> Vec<u64> { store.files().iter().map(|it| it.bytes()).collect() };
    let store = with(&[3, 1]);
    let made = parts(&store);
    assert!(made[0] > made[1], "{made:?}");
    commit(&store, 1);
    drop(store);
    for shares in [&[1, 3][..], &[]] {
        let store = with(shares);
        assert_eq!(parts(&store), made);
        store.adopt(1).unwrap();
        store.roll_back().unwrap();
        check_all(&store, 1);
    }
}

/// Catches: a first half that is final, and a second one without which nothing is.
#[test]
fn a_commit_in_halves_leaves_the_choice() {
    for chosen in [0_u64, 1, 2] {
        let root = tempfile::tempdir().unwrap();
        let store = open(&[root.path()]).unwrap();
        commit(&store, 1);
        for (block, tile, _) in tiles(&store) {
            write(&store, block, tile, 2).unwrap();
        }
        store.prepare_commit("version 2").unwrap();
        drop(store);
        let store = open(&[root.path()]).unwrap();
        assert_eq!(store.found(), [1, 2]);
        let error = write(&store, WEIGHT, 0, 9).unwrap_err();
        assert!(matches!(error, StorageError::Commit { .. }), "{error}");
        assert_eq!(store.adopt(chosen).unwrap().is_some(), chosen > 0);
        assert!(store.adopt(chosen).is_err(), "once");
        assert_eq!(manifests(root.path()).len(), usize::from(chosen > 0));
        store.roll_back().unwrap();
        if chosen == 0 {
            assert!(matches!(
                harness::committing::read(&store, WEIGHT, 0),
                Err(StorageError::NeverWritten { .. })
            ));
        } else {
            check_all(&store, chosen);
        }
        commit(&store, 7);
        drop(store);
        let store = open(&[root.path()]).unwrap();
        assert_eq!(store.found(), [chosen + 1]);
    }
}

/// Catches: a write that is let through while two commits hold both slots.
#[test]
fn between_the_halves_nothing_is_written() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&[root.path()]).unwrap();
    commit(&store, 1);
    write(&store, WEIGHT, 0, 2).unwrap();
    assert!(store.conclude_commit().is_err(), "nothing was prepared");
    store.prepare_commit("").unwrap();
    for refused in [
        write(&store, WEIGHT, 0, 3).unwrap_err(),
        store.prepare_commit("").unwrap_err(),
        store.roll_back().unwrap_err(),
    ] {
        assert!(matches!(refused, StorageError::Commit { .. }), "{refused}");
    }
    check(&store, WEIGHT, 0, 2);
    store.conclude_commit().unwrap();
    write(&store, WEIGHT, 0, 3).unwrap();
}

/// Catches: a commit that frees bytes which somebody still reads.
#[test]
fn what_is_pinned_stays_while_the_store_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&[root.path()]).unwrap();
    assert!(store.pin().is_err(), "there is nothing to pin");
    commit(&store, 1);
    let pin = store.pin().unwrap();
    for (block, tile, _) in tiles(&store) {
        write(&store, block, tile, 2).unwrap();
    }
    let error = store.prepare_commit("").unwrap_err().to_string();
    assert!(error.contains("being read"), "{error}");
    let memory = arena(1 << 20);
    for (block, tile, length) in tiles(&store) {
        let (reply, completions) = std::sync::mpsc::channel();
        store
            .start_read_committed(block, tile, lease(&memory, length), 0, &reply)
            .unwrap();
        let answer = completions.recv_timeout(harness::PATIENCE).unwrap();
        answer.result.unwrap();
        assert!(*answer.buffer == *expected(block, tile, length, 1));
        store.verify_committed(block, tile, &answer.buffer).unwrap();
        check(&store, block, tile, 2);
    }
    drop(pin);
    store.prepare_commit("").unwrap();
}

#[test]
fn a_store_that_is_not_durable_has_no_commits() {
    let root = tempfile::tempdir().unwrap();
    let store = BlockStore::create(harness::stores::options(&[root.path()], true)).unwrap();
    assert_eq!(store.bytes(), 12 * PAGE as u64, "no second slot");
    let error = store.prepare_commit("").unwrap_err();
    assert!(error.to_string().contains("not durable"), "{error}");
    assert!(store.roll_back().is_err() && store.adopt(0).is_err() && store.pin().is_err());
}

/// Catches: space for one slot alone, so that the disk is full at the first commit and not at the start.
#[test]
fn both_slots_are_allocated_at_the_start() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&[root.path()]).unwrap();
    assert_eq!(store.bytes(), 24 * PAGE as u64);
    let found = fs::metadata(root.path().join("job/blocks.bin")).unwrap();
    assert_eq!(found.len(), 24 * PAGE as u64);
    drop(store);
    with_mount("tmpfs", "size=80k", |at| {
        // Room for one slot, not for two.
        let error = open(&[at]).unwrap_err();
        assert!(
            matches!(error, StorageError::NoSpace { need: 98_304, .. }),
            "{error}"
        );
        assert!(fs::read_dir(at).unwrap().next().is_none(), "nothing stays");
    });
}

/// Catches: a commit that is lost, or counts, when its manifest does not fit.
#[test]
fn a_manifest_that_does_not_fit_fails_its_commit_alone() {
    with_mount("tmpfs", "size=160k", |at| {
        let store = open(&[at]).unwrap();
        commit(&store, 1);
        let other = at.join("other");
        let fill = |bytes: usize| fs::write(&other, vec![1; bytes]);
        let mut bytes = 160 << 10;
        while fill(bytes).is_err() {
            bytes -= 4096;
        }
        let error = store.prepare_commit("").unwrap_err();
        assert!(matches!(error, StorageError::NoSpace { .. }), "{error}");
        assert_eq!(store.generation(), 1);
        fs::remove_file(&other).unwrap();
        assert_eq!(commit(&store, 2), 2);
        drop(store);
        let store = open(&[at]).unwrap();
        assert_eq!(store.found(), [2]);
    });
}

/// Catches: another run's state taken for this one's, and state that a refused opening destroys.
#[test]
fn a_run_that_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&[root.path()]).unwrap();
    commit(&store, 1);
    let error = open(&[root.path()]).unwrap_err();
    assert!(matches!(error, StorageError::InUse { .. }), "{error}");
    drop(store);
    let mut other = options(&[root.path()]);
    other.durable = Some(Durable {
        facts: vec![("world size".into(), "4".into())],
    });
    let error = BlockStore::create(other).unwrap_err().to_string();
    for part in ["world size 2", "this one has 4", "durable_name"] {
        assert!(error.contains(part), "{part:?} is missing from {error:?}");
    }
    let mut smaller = options(&[root.path()]);
    smaller.blocks.pop();
    let error = BlockStore::create(smaller).unwrap_err().to_string();
    assert!(
        error.contains("block 1") && error.contains("nothing"),
        "{error}"
    );
    let second = tempfile::tempdir().unwrap();
    let error = open(&[root.path(), second.path()]).unwrap_err();
    assert!(matches!(error, StorageError::OtherRun { .. }), "{error}");
    let store = open(&[root.path()]).unwrap();
    store.adopt(1).unwrap();
    store.roll_back().unwrap();
    check_all(&store, 1);
}

/// Catches: a new store in the place of one whose file was removed or cut, and a damaged manifest taken for none.
#[test]
fn a_file_that_was_removed_cut_or_damaged_is_named() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("there is no blocks.bin", |job| {
            fs::remove_file(job.join("blocks.bin")).unwrap();
        }),
        ("has 4096 bytes, not 98304", |job| {
            let file = fs::File::options().write(true).open(job.join("blocks.bin"));
            file.unwrap().set_len(4096).unwrap();
        }),
        ("header", |job| fs::remove_file(job.join("header")).unwrap()),
        ("header", |job| fs::write(job.join("header"), "x").unwrap()),
        ("manifest-00000000000000000001", |job| {
            let path = job.join("manifest-00000000000000000001");
            let mut bytes = fs::read(&path).unwrap();
            bytes[40] ^= 1;
            fs::write(&path, bytes).unwrap();
        }),
    ];
    for (word, damage) in damages {
        let root = tempfile::tempdir().unwrap();
        commit(&open(&[root.path()]).unwrap(), 1);
        damage(&root.path().join("job"));
        let before = manifests(root.path());
        let error = open(&[root.path()]).unwrap_err().to_string();
        assert!(error.contains(word), "{word:?} is missing from {error:?}");
        assert_eq!(manifests(root.path()), before, "nothing is removed");
    }
}

/// Catches: a later commit after a failed sync, whose data may never have reached the disk.
#[test]
fn after_a_failed_sync_nothing_is_committed_any_more() {
    let root = tempfile::tempdir().unwrap();
    let store = open_with(
        &[root.path()],
        SimOptions {
            sync_faults: vec![(1, libc::EIO)],
            ..SimOptions::default()
        },
    )
    .unwrap();
    commit(&store, 1);
    write(&store, WEIGHT, 0, 2).unwrap();
    let error = store.prepare_commit("").unwrap_err().to_string();
    assert!(
        error.contains("sync") && error.contains("os error 5"),
        "{error}"
    );
    let error = store.prepare_commit("").unwrap_err().to_string();
    assert!(error.contains("has failed before"), "{error}");
    drop(store);
    let store = open(&[root.path()]).unwrap();
    store.adopt(1).unwrap();
    store.roll_back().unwrap();
    check_all(&store, 1);
}

/// The matrix of faults. Each strikes a write after the first commit; the state committed before must come back whole,
/// and what a fault has made of a later version must be noticed or harmless.
///
/// Catches: a write in place, a version committed without its checksum.
#[test]
fn every_fault_of_a_write_is_noticed_or_harmless() {
    let write_fault = |fault| {
        vec![FaultRule {
            kind: Some(OpKind::Write),
            when: Trigger::Nth(7),
            fault,
        }]
    };
    // (fault, what the write says, whether the tile then reads as written)
    let writes = [
        (Fault::Errno(libc::EIO), false, false),
        (Fault::Errno(libc::ENOSPC), false, false),
        (Fault::Errno(libc::EINTR), true, true),
        (Fault::Short(PAGE), true, true),
        (Fault::Short(0), false, false),
        (Fault::Torn(512), true, false),
        (Fault::FlipBit, true, false),
    ];
    for (fault, succeeds, whole) in writes {
        let root = tempfile::tempdir().unwrap();
        let store = open_with(
            &[root.path()],
            SimOptions {
                faults: write_fault(fault),
                ..SimOptions::default()
            },
        )
        .unwrap();
        commit(&store, 1);
        write(&store, WEIGHT, 0, 2).unwrap();
        assert_eq!(write(&store, WEIGHT, 1, 2).is_ok(), succeeds, "{fault:?}");
        let seen = harness::committing::read(&store, WEIGHT, 1);
        match seen {
            Ok(bytes) => assert!(
                whole && bytes == expected(WEIGHT, 1, 2 * PAGE, 2),
                "{fault:?}"
            ),
            Err(error) => assert!(
                !whole && matches!(error, StorageError::Corrupt { .. }),
                "{error}"
            ),
        }
        store.roll_back().unwrap();
        check_all(&store, 1);
        drop(store);
        let store = open(&[root.path()]).unwrap();
        store.adopt(1).unwrap();
        store.roll_back().unwrap();
        check_all(&store, 1);
    }
}

/// Catches: bytes that a fault has changed or kept back, given to who reads them.
#[test]
fn every_fault_of_a_read_is_noticed() {
    let read_fault = |fault| {
        vec![FaultRule {
            kind: Some(OpKind::Read),
            when: Trigger::From(0),
            fault,
        }]
    };
    for (fault, word) in [
        (Fault::Errno(libc::EIO), "os error 5"),
        (Fault::Short(0), "truncated"),
        (Fault::FlipBit, "corrupt"),
    ] {
        let root = tempfile::tempdir().unwrap();
        commit(&open(&[root.path()]).unwrap(), 1);
        let faults = read_fault(fault);
        let store = open_with(
            &[root.path()],
            SimOptions {
                faults,
                ..SimOptions::default()
            },
        )
        .unwrap();
        store.adopt(1).unwrap();
        store.roll_back().unwrap();
        let error = harness::committing::read(&store, MOMENT, 0)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{word:?} is missing from {error:?}");
    }
}

/// Catches: anything at all that a kill at a random instant mixes.
#[test]
fn a_killed_process_leaves_a_whole_commit() {
    let root = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..12_u64 {
        let (path, begun) = (root.path().to_path_buf(), last);
        let pid = harness::fork(move || {
            let store = open(&[&path]).unwrap();
            if let Some(newest) = store.found().last().copied() {
                store.adopt(newest).unwrap();
                store.roll_back().unwrap();
            }
            for version in begun + 1.. {
                commit(&store, version);
            }
            0
        });
        std::thread::sleep(std::time::Duration::from_millis(20 + 7 * round));
        kill(pid);
        let store = open(&[root.path()]).unwrap();
        let Some(newest) = store.found().last().copied() else {
            continue;
        };
        let found = store.adopt(newest).unwrap().unwrap();
        assert!(newest >= last && found.note == format!("version {newest}"));
        store.roll_back().unwrap();
        check_all(&store, newest);
        last = newest;
    }
    assert!(last > 0, "nothing was ever committed");
}

#[test]
fn the_engines_sync_for_real() {
    for kind in [EngineKind::Auto, EngineKind::Threads] {
        let root = tempfile::tempdir().unwrap();
        let mut options = options(&[root.path()]);
        options.queue = open_queue(kind, 4).unwrap();
        let queue = Arc::clone(&options.queue);
        let store = BlockStore::create(options).unwrap();
        queue.sync(&store.files()[0]).unwrap();
        assert!(queue.journal().is_none());
    }
}

//! Scratch directories: one run at a time in each, taken over from the dead, and nothing left over.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use harness::stores::{PAGE, WEIGHT, create, options, queue};
use harness::{PATIENCE, arena, fork, fork_to_outlive, in_fork, kill, lease, with_mount};
use zeroxide_storage::{BlockSpec, BlockStore, Holder, StorageError, StoreOptions};

fn refused(options: StoreOptions) -> StorageError {
    BlockStore::create(options).expect_err("must be refused")
}

fn entries(path: &Path) -> Vec<PathBuf> {
    fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[test]
fn an_ephemeral_store_leaves_nothing_whether_closed_or_dropped() {
    let root = tempfile::tempdir().unwrap();
    let made = root.path().join("made");
    create(&made).unwrap().close().unwrap();
    assert!(
        !made.exists(),
        "the directory made for the store goes with it"
    );
    drop(create(root.path()).unwrap());
    assert!(entries(root.path()).is_empty());
}

#[test]
fn a_store_that_is_kept_releases_its_lock_and_is_taken_over() {
    let root = tempfile::tempdir().unwrap();
    let store = BlockStore::create(options(&[root.path()], false)).unwrap();
    assert!(store.notes().iter().all(|note| !note.contains("took over")));
    store.close().unwrap();
    assert!(root.path().join("job/blocks.bin").exists());
    let store = create(root.path()).unwrap();
    let notes = store.notes();
    assert!(
        notes
            .iter()
            .any(|note| note.contains("took over") && note.contains("discarded")),
        "{notes:?}"
    );
    let (reply, _completions) = channel();
    let arena = arena(1 << 20);
    assert!(
        store
            .start_read(WEIGHT, 0, lease(&arena, 2 * PAGE), 0, &reply)
            .is_err()
    );
}

#[test]
fn a_live_run_is_refused_by_its_process_id() {
    let root = tempfile::tempdir().unwrap();
    let store = create(root.path()).unwrap();
    let parent = std::process::id();
    for attempt in [create(root.path()).map(drop).unwrap_err(), {
        let code = in_fork(|| match create(root.path()) {
            Err(StorageError::InUse {
                holder: Holder::Run { pid },
                ..
            }) if pid == parent => 0,
            _ => 1,
        });
        assert_eq!(code, Some(0), "a second process must be refused too");
        create(root.path()).map(drop).unwrap_err()
    }] {
        let message = attempt.to_string();
        assert!(
            message.contains(&format!("already in use by live run pid {parent}")),
            "{message}"
        );
    }
    // Another job shares the directory.
    let other = StoreOptions {
        job: "other".into(),
        ..options(&[root.path()], true)
    };
    BlockStore::create(other).unwrap().close().unwrap();
    store.close().unwrap();
    create(root.path()).unwrap();
}

/// Starts a run in a forked child that holds `root` until it is killed.
fn run_until_killed(root: &Path, leave_a_child: bool) -> (libc::pid_t, Option<libc::pid_t>) {
    let ready = root.join("ready");
    let pid = fork(|| {
        let _store = create(root).unwrap();
        let child = leave_a_child.then(|| {
            fork_to_outlive(|| {
                std::thread::sleep(PATIENCE);
                0
            })
        });
        fs::write(root.join("writing"), format!("{}", child.unwrap_or(0))).unwrap();
        fs::rename(root.join("writing"), root.join("ready")).unwrap();
        loop {
            std::thread::sleep(PATIENCE);
        }
    });
    while !ready.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let child: libc::pid_t = fs::read_to_string(&ready).unwrap().parse().unwrap();
    fs::remove_file(&ready).unwrap();
    (pid, (child != 0).then_some(child))
}

#[test]
fn a_killed_run_is_taken_over_with_a_note() {
    let root = tempfile::tempdir().unwrap();
    let (pid, _) = run_until_killed(root.path(), false);
    assert!(create(root.path()).is_err(), "it is still alive");
    kill(pid);
    let store = create(root.path()).unwrap();
    let notes = store.notes();
    assert!(
        notes
            .iter()
            .any(|note| note.contains(&format!("pid {pid}"))),
        "{notes:?}"
    );
}

#[test]
fn a_lock_left_to_a_forked_child_names_the_run_that_ended() {
    let root = tempfile::tempdir().unwrap();
    let (pid, child) = run_until_killed(root.path(), true);
    kill(pid);
    let error = create(root.path()).map(drop).unwrap_err();
    // SAFETY: takes no pointers; the process is the test's own grandchild.
    unsafe { libc::kill(child.unwrap(), libc::SIGKILL) };
    match error {
        StorageError::InUse {
            holder: Holder::Orphan { pid: named },
            ..
        } => {
            assert_eq!(named, u32::try_from(pid).unwrap());
        }
        other => panic!("{other}"),
    }
}

/// A forked child shares the lock and the files without owning them; one that outlives the store does
/// not keep the lock either.
#[test]
fn a_forked_child_neither_removes_nor_releases() {
    let root = tempfile::tempdir().unwrap();
    let mut store = Some(create(root.path()).unwrap());
    let code = in_fork(|| {
        let store = store.take().unwrap();
        let forked = |error| matches!(error, StorageError::Forked { .. });
        if !store.verify(WEIGHT, 0, &[]).is_err_and(forked) {
            return 1;
        }
        drop(store);
        0
    });
    assert_eq!(code, Some(0));
    assert!(
        root.path().join("job/blocks.bin").exists(),
        "the child removed the parent's files"
    );
    assert!(
        create(root.path()).is_err(),
        "the child released the parent's lock"
    );
    store.take().unwrap().close().unwrap();
    // Kept, so that its lock file stays.
    let store = BlockStore::create(options(&[root.path()], false)).unwrap();
    let child = fork(|| {
        loop {
            std::thread::sleep(PATIENCE);
        }
    });
    store.close().unwrap();
    let again = create(root.path());
    kill(child);
    again.expect("a closed store is free, whatever was forked from its run");
}

#[test]
fn foreign_directories_are_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let theirs = root.path().join("job/thesis.txt");
    fs::create_dir(root.path().join("job")).unwrap();
    fs::write(&theirs, "years of work").unwrap();
    let error = create(root.path()).map(drop).unwrap_err();
    assert!(matches!(error, StorageError::Foreign { .. }), "{error}");
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "years of work");
    assert_eq!(entries(root.path()).len(), 1);
    // And a file that someone puts into a live scratch directory survives its removal.
    fs::remove_file(&theirs).unwrap();
    let store = create(root.path()).unwrap();
    fs::write(&theirs, "more").unwrap();
    store.close().unwrap();
    assert_eq!(entries(&root.path().join("job")), [theirs]);
}

#[test]
fn unusable_paths_and_names_are_told_apart_and_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("below")] {
        let error = create(&path).map(drop).unwrap_err();
        assert!(
            matches!(error, StorageError::NotADirectory { .. }),
            "{error}"
        );
    }
    let error = create(&root.path().join("no/such")).map(drop).unwrap_err();
    match error {
        StorageError::MissingParent { missing, .. } => assert_eq!(missing, root.path().join("no")),
        other => panic!("{other}"),
    }
    for job in ["", ".", "..", "a/b", "a\0b", &"x".repeat(201)] {
        let error = refused(StoreOptions {
            job: job.into(),
            ..options(&[root.path()], true)
        });
        assert!(matches!(error, StorageError::JobName { .. }), "{error}");
    }
    let error = refused(options(&[root.path(), &root.path().join(".")], true));
    assert!(
        matches!(error, StorageError::DuplicateDirectory { .. }),
        "{error}"
    );
    for shares in [vec![1], vec![1, 0], vec![1, 2, 3]] {
        let second = root.path().join("second");
        let error = refused(StoreOptions {
            shares,
            ..options(&[root.path(), &second], true)
        });
        assert!(matches!(error, StorageError::Shares { .. }), "{error}");
    }
    let error = refused(options(&[], true));
    assert!(matches!(error, StorageError::Layout { .. }), "{error}");
    // The first directory is fine, the second is not: the first is cleaned up.
    let error = refused(options(&[root.path(), &file], false));
    assert!(
        matches!(error, StorageError::NotADirectory { .. }),
        "{error}"
    );
    assert_eq!(entries(root.path()), [file]);
}

#[test]
fn a_disk_without_room_says_how_much_is_needed_and_free() {
    with_mount("tmpfs", "size=1m", |path| {
        let id = WEIGHT;
        let huge = vec![BlockSpec {
            id,
            bytes: 64 << 20,
            tile_bytes: 1 << 20,
            committed: true,
        }];
        let error = refused(StoreOptions {
            blocks: huge,
            ..options(&[path], true)
        });
        match error {
            StorageError::NoSpace { need, free, .. } => {
                assert_eq!(need, 64 << 20);
                assert!(free <= 1 << 20, "{free}");
            }
            other => panic!("{other}"),
        }
        assert!(entries(path).is_empty());
        create(path).unwrap();
    });
    // Without a mount: no file system is this large.
    let root = tempfile::tempdir().unwrap();
    let (bytes, tile_bytes) = (1 << 60, 1 << 40);
    let huge = vec![BlockSpec {
        id: WEIGHT,
        bytes,
        tile_bytes,
        committed: true,
    }];
    let error = refused(StoreOptions {
        blocks: huge,
        ..options(&[root.path()], true)
    });
    assert!(
        matches!(error, StorageError::NoSpace { need, free, .. } if free < need),
        "{error}"
    );
    assert!(entries(root.path()).is_empty());
}

#[test]
fn a_read_only_file_system_is_named() {
    with_mount("tmpfs", "", |path| {
        harness::remount_read_only(path);
        for path in [path.to_path_buf(), path.join("below")] {
            let error = create(&path).map(drop).unwrap_err();
            assert!(matches!(error, StorageError::ReadOnly { .. }), "{error}");
        }
    });
}

/// Threads that fight for one job, each removing the directory when done: never two at a time, and no
/// error but "in use".
#[test]
fn the_lock_holds_while_directories_come_and_go() {
    let root = tempfile::tempdir().unwrap();
    let queue = queue();
    let held = AtomicBool::new(false);
    let wins: usize = std::thread::scope(|scope| {
        let contender = || {
            let mut wins = 0;
            for _ in 0..300 {
                let options = StoreOptions {
                    queue: Arc::clone(&queue),
                    ..options(&[root.path()], true)
                };
                match BlockStore::create(options) {
                    Ok(store) => {
                        assert!(
                            !held.swap(true, Ordering::SeqCst),
                            "two stores in one directory"
                        );
                        wins += 1;
                        held.store(false, Ordering::SeqCst);
                        store.close().unwrap();
                    }
                    Err(StorageError::InUse { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            wins
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(contender)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert!(wins > 0);
    assert!(entries(root.path()).is_empty());
}

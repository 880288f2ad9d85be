//! Queues that are idle use no processor time, and queues that are closed leave nothing behind.
//!
//! One test, since it counts the threads and descriptors of the whole process.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::time::{Duration, Instant};

use harness::{Client, arena, lease};
use zeroxide_storage::{DiskFile, EngineKind, OpKind, SimOptions, StorageError, open_queue};

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// Processor time of the process so far, in clock ticks: fields 14 and 15 of proc(5) stat.
fn processor_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn idle_queues_rest_and_closed_queues_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let file = DiskFile::create(directory.path().join("data"), 1 << 20).unwrap();
    let arena = arena(1 << 20);
    let kinds = [
        EngineKind::IoUring,
        EngineKind::Threads,
        EngineKind::Simulated(SimOptions::default()),
    ];
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.matches("io_uring").count()
    };
    let counts = || {
        (
            entries("/proc/self/task"),
            entries("/proc/self/fd"),
            mappings(),
        )
    };
    let before = counts();
    for kind in kinds {
        for close in [true, false] {
            let queue = match open_queue(kind.clone(), 8) {
                Err(StorageError::IoUringRefused { .. }) => continue,
                other => other.unwrap(),
            };
            let client = Client::new(&*queue);
            for _ in 0..10 {
                client
                    .run(OpKind::Read, &file, 0, lease(&arena, 4096))
                    .1
                    .unwrap();
            }
            let ticks = processor_ticks();
            std::thread::sleep(Duration::from_millis(300));
            // A spinning thread would use 30 ticks of 10 ms.
            let used = processor_ticks() - ticks;
            assert!(
                used <= 5,
                "{} used {used} ticks while idle",
                queue.describe()
            );
            if close {
                queue.close();
            }
            drop(queue);
            // A joined thread leaves the process list a moment after it has ended.
            let deadline = Instant::now() + Duration::from_secs(2);
            while counts() != before && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(
                counts(),
                before,
                "threads, descriptors, mappings of {kind:?}"
            );
        }
    }
}

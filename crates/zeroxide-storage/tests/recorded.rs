//! What a recorder has of a queue's transfers, on every engine.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::sync::mpsc::channel;
use std::time::Duration;

use harness::engines::{threads, uring};
use harness::stores::{MOMENT, PAGE, WEIGHT, options};
use harness::{PATIENCE, arena, lease};
use zeroxide_memory::{Activity, Budget, Recorder};
use zeroxide_storage::{
    BlockStore, Completion, EngineKind, QueueOptions, SimOptions, StoreOptions, open_queue_with,
};

/// Each transfer takes `least` at least.
fn a_transfer_is_recorded_once_from_acceptance_to_answer(kind: EngineKind, least: Duration) {
    let directory = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let queue_options = QueueOptions {
        recorder: recorder.clone(),
        ..QueueOptions::default()
    };
    let store = BlockStore::create(StoreOptions {
        queue: open_queue_with(kind, 4, &queue_options).unwrap(),
        ..options(&[directory.path()], true)
    })
    .unwrap();
    let arena = arena(1 << 20);
    let (reply, completions) = channel::<Completion>();
    let answer = || completions.recv_timeout(PATIENCE).unwrap().result.unwrap();
    let write = |block, tile, pages: usize| {
        let mut buffer = lease(&arena, pages * PAGE);
        buffer.fill(1);
        store
            .start_write(block, tile, buffer, 0, &reply)
            .map_err(|(error, _)| error)
            .unwrap();
    };
    // Before it is on.
    write(WEIGHT, 0, 2);
    answer();
    recorder.start(&Budget::new(None), 64).unwrap();
    write(WEIGHT, 1, 2);
    write(MOMENT, 0, 3);
    answer();
    answer();
    store
        .start_read(WEIGHT, 1, lease(&arena, 2 * PAGE), 0, &reply)
        .map_err(|(error, _)| error)
        .unwrap();
    answer();
    let recording = recorder.stop().unwrap();
    assert_eq!(recording.left_out(), 0);
    let events = recording.events();
    let mut found: Vec<_> = events
        .iter()
        .map(|event| (event.activity.name(), event.unit, event.bytes))
        .collect();
    found.sort_unstable();
    let page = PAGE as u64;
    assert_eq!(
        found,
        [
            ("read", Some(0), 2 * page),
            ("write", Some(0), 2 * page),
            ("write", Some(1), 3 * page),
        ]
    );
    let read = events.last().unwrap();
    assert_eq!(read.activity, Activity::Read);
    // It was accepted when both writes had been answered.
    assert!(events[..2].iter().all(|write| write.end <= read.begin));
    let shortest = events.iter().map(|event| event.end - event.begin).min();
    assert!(
        u128::from(shortest.unwrap()) > least.as_nanos(),
        "{events:?}"
    );
}

#[test]
fn with_io_uring() {
    if let Some(kind) = uring() {
        a_transfer_is_recorded_once_from_acceptance_to_answer(kind, Duration::ZERO);
    }
}

#[test]
fn with_threads() {
    a_transfer_is_recorded_once_from_acceptance_to_answer(threads().unwrap(), Duration::ZERO);
}

#[test]
fn with_a_simulated_disk() {
    let latency = Duration::from_millis(3);
    let kind = EngineKind::Simulated(SimOptions {
        latency: latency..2 * latency,
        ..SimOptions::default()
    });
    a_transfer_is_recorded_once_from_acceptance_to_answer(kind, latency);
}

//! The recorder: what it keeps, what it leaves out, what it costs in the budget, and that nobody waits for it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use zeroxide_memory::{Activity, Bucket, Budget, MemoryError, Recorder};

fn note(recorder: &Recorder, bytes: u64) {
    let begun = recorder.begin();
    recorder.end(begun, Activity::Update, Some(3), bytes);
}

#[test]
fn what_happens_while_it_is_off_is_nowhere() {
    let (recorder, budget) = (Recorder::default(), Budget::new(None));
    note(&recorder, 1);
    let before = recorder.begin();
    recorder.start(&budget, 8).unwrap();
    recorder.end(before, Activity::Read, None, 2);
    note(&recorder, 3);
    let recording = recorder.stop().expect("it was on");
    note(&recorder, 4);
    assert!(recorder.stop().is_none());
    let bytes: Vec<u64> = recording.events().iter().map(|event| event.bytes).collect();
    assert_eq!(bytes, [3]);
}

#[test]
fn an_event_has_its_times_its_thread_and_its_unit() {
    let (recorder, budget) = (Recorder::default(), Budget::new(None));
    recorder.start(&budget, 8).unwrap();
    let outer = recorder.begin();
    let inner = recorder.begin();
    thread::sleep(Duration::from_millis(5));
    recorder.end(inner, Activity::DiskWait, None, 0);
    recorder.end(outer, Activity::Gather, Some(7), 10);
    let copy = recorder.clone();
    thread::spawn(move || note(&copy, 1)).join().unwrap();
    let events = recorder.stop().unwrap().events();
    let [gather, wait, update] = events.as_slice() else {
        panic!("{events:?}");
    };
    assert_eq!(
        (wait.activity, gather.activity),
        (Activity::DiskWait, Activity::Gather)
    );
    assert_eq!((wait.unit, gather.unit, gather.bytes), (None, Some(7), 10));
    assert!(gather.begin <= wait.begin && wait.end <= gather.end);
    assert!(wait.end - wait.begin >= 5_000_000);
    assert!(update.begin >= gather.end);
    assert_eq!(wait.thread, gather.thread);
    assert_ne!(update.thread, gather.thread);
}

#[test]
fn activities_are_listed_at_their_numbers() {
    for (number, activity) in Activity::ALL.into_iter().enumerate() {
        assert_eq!(activity as usize, number);
    }
    let names: HashSet<&str> = Activity::ALL.iter().map(|each| each.name()).collect();
    assert_eq!(names.len(), Activity::ALL.len());
}

#[test]
fn the_newest_events_stay_and_the_others_are_counted() {
    let (recorder, budget) = (Recorder::default(), Budget::new(None));
    recorder.start(&budget, 4).unwrap();
    for bytes in 0..11 {
        note(&recorder, bytes);
    }
    let recording = recorder.stop().unwrap();
    assert_eq!(recording.left_out(), 7);
    let bytes: Vec<u64> = recording.events().iter().map(|event| event.bytes).collect();
    assert_eq!(bytes, [7, 8, 9, 10]);
}

#[test]
fn its_memory_is_in_the_budget_for_as_long_as_it_is_there() {
    let (recorder, budget) = (Recorder::default(), Budget::new(Some(1000)));
    let current = || budget.usage(Bucket::Recorder).current;
    recorder.start(&budget, 2).unwrap();
    let each = current() / 2;
    assert!(each >= 40, "an event alone has 40 bytes: {each}");
    note(&recorder, 5);
    match recorder.start(&budget, 1000) {
        Err(MemoryError::OverBudget {
            bucket,
            need,
            used,
            limit,
        }) => {
            assert_eq!((bucket, need), (Bucket::Recorder, 1000 * each));
            assert_eq!((used, limit), (2 * each, 1000));
        }
        other => panic!("{other:?}"),
    }
    let recording = recorder.stop().unwrap();
    assert_eq!(current(), 2 * each);
    assert_eq!(recording.events().len(), 1, "what was on went on");
    assert_eq!(current(), 0);
    recorder.start(&budget, 2).unwrap();
    drop(recorder);
    assert_eq!(current(), 0);
}

#[test]
fn threads_record_while_it_is_started_and_stopped() {
    const THREADS: u64 = 4;
    let (recorder, budget) = (Recorder::default(), Budget::new(None));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (recorder, done) = (recorder.clone(), &done);
            scope.spawn(move || {
                let mut count = 0;
                while !done.load(Ordering::Relaxed) {
                    note(&recorder, count * THREADS + thread);
                    count += 1;
                }
            });
        }
        let mut kept = 0;
        for _ in 0..200 {
            recorder.start(&budget, 16).unwrap();
            thread::sleep(Duration::from_micros(200));
            let events = recorder.stop().unwrap().events();
            let different: HashSet<u64> = events.iter().map(|event| event.bytes).collect();
            assert_eq!(different.len(), events.len(), "an event is there once");
            assert!(events.iter().all(|event| event.begin <= event.end));
            kept += events.len();
        }
        done.store(true, Ordering::Relaxed);
        assert!(kept > 0, "nothing was recorded, so nothing was shown");
    });
    assert_eq!(budget.total().current, 0);
}

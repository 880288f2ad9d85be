//! One suite for all engines: whatever a queue promises, every engine must keep.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::engines::{simulated, simulated_in_memory, threads, uring};
use harness::{Client, PATIENCE, arena, fill, in_fork, lease, pattern, with_mount};
use zeroxide_storage::{Completion, DiskFile, EngineKind, OpKind, StorageError, open_queue};

const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// A file in a fresh directory.
fn file(bytes: u64) -> (tempfile::TempDir, Arc<DiskFile>) {
    let directory = tempfile::tempdir().unwrap();
    let file = DiskFile::create(directory.path().join("data"), bytes).unwrap();
    (directory, file)
}

fn what_is_written_is_read_back(kind: EngineKind) {
    let (_directory, file) = file(4 * MIB);
    let arena = arena(2 << 20);
    let queue = open_queue(kind, 4).unwrap();
    let client = Client::new(&*queue);
    let places = [
        (0, PAGE),
        (PAGE as u64, 3 * PAGE),
        (MIB, 1 << 20),
        (4 * MIB - 4096, PAGE),
    ];
    for (seed, (offset, length)) in (1..).zip(places) {
        let mut buffer = lease(&arena, length);
        fill(&mut buffer, seed);
        let (_, result) = client.run(OpKind::Write, &file, offset, buffer);
        result.unwrap();
    }
    for (seed, (offset, length)) in (1..).zip(places) {
        let (buffer, result) = client.run(OpKind::Read, &file, offset, lease(&arena, length));
        result.unwrap();
        assert!(*buffer == *pattern(length, seed), "wrong bytes at {offset}");
    }
}

/// Seeded rounds of disjoint operations, many more than the depth, against a model in memory.
fn random_operations_agree_with_a_model(kind: EngineKind) {
    const PAGES: u64 = 512;
    let (_directory, file) = file(PAGES * PAGE as u64);
    let arena = arena(8 << 20);
    let queue = open_queue(kind, 5).unwrap();
    let client = Client::new(&*queue);
    let mut model = vec![0_u8; usize::try_from(file.bytes()).unwrap()];
    let mut zeros = lease(&arena, model.len());
    zeros.fill(0);
    client.run(OpKind::Write, &file, 0, zeros).1.unwrap();
    for round in 0..40_u64 {
        let mut expected = HashMap::new();
        let mut page = 0;
        while page < PAGES {
            let draw = u64::from_le_bytes(pattern(8, round * PAGES + page + 1).try_into().unwrap());
            let pages = (1 + draw % 16).min(PAGES - page);
            let range = usize::try_from(page).unwrap() * PAGE
                ..usize::try_from(page + pages).unwrap() * PAGE;
            let mut buffer = lease(&arena, range.len());
            if draw & 256 == 0 {
                fill(&mut buffer, draw);
                model[range.clone()].copy_from_slice(&buffer);
                client.start(OpKind::Write, &file, range.start as u64, buffer, page);
            } else {
                fill(&mut buffer, !draw);
                client.start(OpKind::Read, &file, range.start as u64, buffer, page);
            }
            expected.insert(page, range);
            page += pages;
        }
        while !expected.is_empty() {
            let Completion {
                tag,
                buffer,
                result,
                ..
            } = client.next();
            result.unwrap();
            let range = expected
                .remove(&tag)
                .expect("a tag answered twice or never sent");
            assert!(buffer[..] == model[range], "round {round}, page {tag}");
        }
        assert!(client.completions.try_recv().is_err(), "an answer too many");
    }
}

fn what_cannot_succeed_is_refused_with_its_buffer(kind: EngineKind) {
    let (_directory, file) = file(8 * PAGE as u64);
    let arena = arena(16 * PAGE);
    let queue = open_queue(kind, 2).unwrap();
    let client = Client::new(&*queue);
    for offset in [8 * PAGE as u64, 7 * PAGE as u64, u64::MAX - 4095] {
        let operation = client.operation(OpKind::Read, &file, offset, lease(&arena, 2 * PAGE), 9);
        let (error, operation) = queue.submit(operation).unwrap_err();
        assert!(
            matches!(error, StorageError::OutOfRange { bytes: 32768, .. }),
            "{error}"
        );
        assert_eq!((operation.tag, operation.buffer.len()), (9, 2 * PAGE));
    }
    if file.is_direct() {
        let mut whole = lease(&arena, 2 * PAGE);
        let mut odd_address = whole.split_off(512);
        let _odd_end = odd_address.split_off(PAGE);
        for (offset, buffer) in [(512, lease(&arena, PAGE)), (0, whole), (0, odd_address)] {
            let operation = client.operation(OpKind::Write, &file, offset, buffer, 0);
            let (error, _) = queue.submit(operation).unwrap_err();
            assert!(
                matches!(error, StorageError::Misaligned { align: 4096, .. }),
                "{error}"
            );
        }
    }
    assert_eq!(
        queue.counters().read.operations + queue.counters().write.operations,
        0
    );
}

/// The file is cut behind the queue's back: at the start of the operation, and in its middle.
#[expect(clippy::needless_pass_by_value, reason = "as every case of the suite")]
fn a_truncated_file_is_a_short_transfer(kind: EngineKind) {
    for (left, reached) in [(0, 0), (5 * PAGE, PAGE), (5 * PAGE + 700, PAGE + 700)] {
        let (_directory, file) = file(8 * PAGE as u64);
        let arena = arena(8 * PAGE);
        let queue = open_queue(kind.clone(), 2).unwrap();
        let client = Client::new(&*queue);
        let cut = std::fs::OpenOptions::new()
            .write(true)
            .open(file.path())
            .unwrap();
        cut.set_len(left as u64).unwrap();
        let (buffer, result) = client.run(
            OpKind::Read,
            &file,
            4 * PAGE as u64,
            lease(&arena, 3 * PAGE),
        );
        let error = result.unwrap_err();
        assert_eq!(buffer.len(), 3 * PAGE);
        let StorageError::ShortTransfer {
            expected,
            got,
            offset,
            ref path,
            ..
        } = error
        else {
            panic!("not a short transfer: {error}");
        };
        assert_eq!(
            (expected, offset, &**path),
            (3 * PAGE, 4 * PAGE as u64, file.path())
        );
        assert!(
            got == reached || got == reached / 512 * 512,
            "{got} of {reached}"
        );
    }
}

fn closing_answers_everything_and_refuses_the_rest(kind: EngineKind) {
    let (_directory, file) = file(16 * MIB);
    let arena = arena(16 << 20);
    let queue = open_queue(kind, 3).unwrap();
    let client = Client::new(&*queue);
    for tag in 0..64 {
        let mut buffer = lease(&arena, 256 << 10);
        fill(&mut buffer, tag + 1);
        client.start(OpKind::Write, &file, tag * (256 << 10), buffer, tag);
    }
    queue.close();
    queue.close();
    let answers: Vec<Completion> = client.completions.try_iter().collect();
    assert_eq!(
        answers.len(),
        64,
        "every operation is answered before close returns"
    );
    let raw = std::fs::read(file.path()).unwrap();
    for Completion {
        tag,
        buffer,
        result,
        ..
    } in answers
    {
        let start = usize::try_from(tag).unwrap() * buffer.len();
        match result {
            Ok(()) => assert!(
                raw[start..start + buffer.len()] == *buffer,
                "tile {tag} half done"
            ),
            Err(StorageError::Closed) => {}
            Err(other) => panic!("{other}"),
        }
    }
    let operation = client.operation(OpKind::Read, &file, 0, lease(&arena, PAGE), 5);
    let (error, operation) = queue.submit(operation).unwrap_err();
    assert!(matches!(error, StorageError::Closed), "{error}");
    assert_eq!(operation.tag, 5);
}

fn dropping_answers_everything(kind: EngineKind) {
    let (_directory, file) = file(8 * MIB);
    let arena = arena(8 << 20);
    let queue = open_queue(kind, 4).unwrap();
    let (reply, completions) = {
        let client = Client::new(&*queue);
        for tag in 0..32 {
            client.start(
                OpKind::Read,
                &file,
                tag * (256 << 10),
                lease(&arena, 256 << 10),
                tag,
            );
        }
        (client.reply, client.completions)
    };
    drop(queue);
    drop(reply);
    assert_eq!(completions.iter().count(), 32, "an operation was lost");
    assert_eq!(arena.free().unwrap(), arena.capacity());
}

fn buffers_of_an_absent_receiver_are_released(kind: EngineKind) {
    let (_directory, file) = file(4 * MIB);
    let arena = arena(4 << 20);
    let queue = open_queue(kind, 4).unwrap();
    let Client {
        reply, completions, ..
    } = Client::new(&*queue);
    drop(completions);
    let client = Client {
        queue: &*queue,
        reply,
        completions: std::sync::mpsc::channel().1,
    };
    for tag in 0..16 {
        client.start(
            OpKind::Read,
            &file,
            tag * (256 << 10),
            lease(&arena, 256 << 10),
            tag,
        );
    }
    queue.close();
    assert_eq!(arena.free().unwrap(), arena.capacity());
}

fn many_threads_share_a_queue(kind: EngineKind) {
    const EACH: u64 = 64;
    let (_directory, file) = file(8 * EACH * PAGE as u64);
    let arena = arena(4 << 20);
    let queue = open_queue(kind, 7).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (queue, file, arena) = (&queue, &file, &arena);
            scope.spawn(move || {
                let client = Client::new(&**queue);
                let place = |index| (thread * EACH + index) * PAGE as u64;
                for index in 0..EACH {
                    let mut buffer = lease(arena, PAGE);
                    fill(&mut buffer, place(index) + 1);
                    client.start(OpKind::Write, file, place(index), buffer, index);
                }
                for _ in 0..EACH {
                    client.next().result.unwrap();
                }
                for index in 0..EACH {
                    client.start(OpKind::Read, file, place(index), lease(arena, PAGE), index);
                }
                for _ in 0..EACH {
                    let Completion {
                        tag,
                        buffer,
                        result,
                        ..
                    } = client.next();
                    result.unwrap();
                    assert!(*buffer == *pattern(PAGE, place(tag) + 1), "thread {thread}");
                }
            });
        }
    });
}

fn counters_count_bytes_operations_and_time(kind: EngineKind) {
    let (_directory, file) = file(MIB);
    let arena = arena(1 << 20);
    let queue = open_queue(kind, 4).unwrap();
    let client = Client::new(&*queue);
    let start = Instant::now();
    for index in 0..4 {
        let (_, result) = client.run(
            OpKind::Write,
            &file,
            index * (256 << 10),
            lease(&arena, 256 << 10),
        );
        result.unwrap();
    }
    for index in 0..2 {
        client
            .run(
                OpKind::Read,
                &file,
                index * PAGE as u64,
                lease(&arena, PAGE),
            )
            .1
            .unwrap();
    }
    std::thread::sleep(Duration::from_millis(20));
    let elapsed = start.elapsed();
    let counters = queue.counters();
    assert_eq!((counters.write.bytes, counters.write.operations), (MIB, 4));
    assert_eq!(
        (counters.read.bytes, counters.read.operations),
        (2 * PAGE as u64, 2)
    );
    assert_eq!((counters.read.failed, counters.write.failed), (0, 0));
    assert!(counters.read.busy > Duration::ZERO && counters.write.busy > Duration::ZERO);
    assert!(
        counters.busy + Duration::from_millis(20) <= elapsed,
        "idle time was counted as busy"
    );
    assert_eq!(*counters.of(OpKind::Read), counters.read);
}

/// A forked child that uses the parent's queue gets an error, at once, and may drop it; the parent's
/// queue goes on.
fn a_forked_child_is_refused(kind: EngineKind) {
    let (_directory, file) = file(MIB);
    let arena = arena(1 << 20);
    let queue = open_queue(kind, 4).unwrap();
    let client = Client::new(&*queue);
    let mut buffer = lease(&arena, PAGE);
    fill(&mut buffer, 3);
    client.run(OpKind::Write, &file, 0, buffer).1.unwrap();
    let child_buffer = lease(&arena, PAGE);
    let parents = Arc::clone(&queue);
    let code = in_fork(|| {
        let operation = client.operation(OpKind::Read, &file, 0, child_buffer, 0);
        let Err((StorageError::Forked { created, current }, operation)) = queue.submit(operation)
        else {
            return 1;
        };
        if created == current || operation.buffer.len() != PAGE {
            return 2;
        }
        if queue.counters().write.operations != 0 {
            return 3;
        }
        queue.close();
        drop(parents);
        0
    });
    assert_eq!(code, Some(0), "None means that the child hung");
    let (buffer, result) = client.run(OpKind::Read, &file, 0, lease(&arena, PAGE));
    result.unwrap();
    assert!(*buffer == *pattern(PAGE, 3));
}

/// Dropping the last reference in a forked child must not wait for threads that are not there.
fn a_forked_child_may_drop_the_queue(kind: EngineKind) {
    let queue = open_queue(kind, 4).unwrap();
    let mut mine = Some(queue);
    let code = in_fork(|| {
        drop(mine.take());
        0
    });
    assert_eq!(code, Some(0), "None means that the child hung");
    mine.expect("the parent's own").close();
}

/// The file system has no `O_DIRECT` and no fallocate: buffered, and any alignment goes.
fn a_file_system_without_direct_io_is_buffered(kind: EngineKind) {
    with_mount("ramfs", "", |path| {
        let file = DiskFile::create(path.join("data"), 10_000).unwrap();
        assert!(!file.is_direct());
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 10_000);
        let arena = arena(2 * PAGE);
        let queue = open_queue(kind, 2).unwrap();
        let client = Client::new(&*queue);
        let mut buffer = lease(&arena, 1001);
        fill(&mut buffer, 8);
        client.run(OpKind::Write, &file, 333, buffer).1.unwrap();
        let (buffer, result) = client.run(OpKind::Read, &file, 333, lease(&arena, 1001));
        result.unwrap();
        assert!(*buffer == *pattern(1001, 8));
        queue.close();
    });
}

/// A sparse file on a full file system: the write fails by name, with what is needed and free.
fn a_full_disk_is_named(kind: EngineKind) {
    with_mount("tmpfs", "size=256k", |path| {
        std::fs::File::create(path.join("data"))
            .unwrap()
            .set_len(MIB)
            .unwrap();
        let file = DiskFile::open(path.join("data")).unwrap();
        let arena = arena(1 << 20);
        let queue = open_queue(kind, 2).unwrap();
        let client = Client::new(&*queue);
        let (buffer, result) = client.run(OpKind::Write, &file, 0, lease(&arena, 1 << 20));
        let error = result.unwrap_err();
        assert_eq!(buffer.len(), 1 << 20);
        match error {
            StorageError::NoSpace { need, free, .. } => {
                assert!(need > free && need <= MIB, "need {need}, free {free}");
            }
            other => panic!("{other}"),
        }
        assert_eq!(queue.counters().write.failed, 1);
        queue.close();
    });
}

/// The wake-up must not get lost: single operations, each submitted the moment the engine goes to sleep.
fn an_idle_engine_wakes_up(kind: EngineKind) {
    let (_directory, file) = file(MIB);
    let arena = arena(1 << 20);
    let queue = open_queue(kind, 2).unwrap();
    let client = Client::new(&*queue);
    let start = Instant::now();
    for _ in 0..500 {
        client
            .run(OpKind::Read, &file, 0, lease(&arena, PAGE))
            .1
            .unwrap();
    }
    assert!(start.elapsed() < PATIENCE);
}

/// The suite, once per engine.
macro_rules! conformance {
    ($engine:ident: $($case:ident),* $(,)?) => {
        mod $engine { $(
            #[test]
            fn $case() {
                if let Some(kind) = super::$engine() {
                    super::$case(kind);
                }
            }
        )* }
    };
}

/// What every engine must pass.
macro_rules! on_any_storage {
    ($engine:ident $(, $more:ident)*) => {
        conformance! {
            $engine:
            what_is_written_is_read_back,
            random_operations_agree_with_a_model,
            what_cannot_succeed_is_refused_with_its_buffer,
            dropping_answers_everything,
            buffers_of_an_absent_receiver_are_released,
            many_threads_share_a_queue,
            counters_count_bytes_operations_and_time,
            a_forked_child_is_refused,
            a_forked_child_may_drop_the_queue,
            an_idle_engine_wakes_up,
            $($more,)*
        }
    };
}

/// What every engine that moves bytes to and from real files must pass beyond that.
macro_rules! on_files {
    ($engine:ident) => {
        on_any_storage! {
            $engine,
            a_truncated_file_is_a_short_transfer,
            closing_answers_everything_and_refuses_the_rest,
            a_file_system_without_direct_io_is_buffered,
            a_full_disk_is_named
        }
    };
}

on_files!(uring);
on_files!(threads);
on_files!(simulated);
on_any_storage!(simulated_in_memory);

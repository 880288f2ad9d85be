//! The worker pool: every task once, on its own thread or on a free one, panics passed on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ThreadId};

use zeroxide_optim::Pool;

fn owners(pool: &Pool, tasks: usize) -> Vec<Option<ThreadId>> {
    let owners = Mutex::new(vec![None; tasks]);
    pool.run(tasks, |index| {
        let before = owners.lock().expect("no task panics")[index].replace(thread::current().id());
        assert!(before.is_none(), "task {index} ran twice");
    });
    owners.into_inner().expect("no task panics")
}

#[test]
fn the_map_from_task_to_thread_is_fixed() {
    let pool = Pool::new(3).expect("threads");
    let first = owners(&pool, 20);
    for (index, owner) in first.iter().enumerate() {
        assert!(owner.is_some());
        assert_eq!(*owner, first[index % 3]);
    }
    for _ in 0..20 {
        assert_eq!(owners(&pool, 20), first);
    }
    assert_ne!(first[0], first[1]);
}

#[test]
fn no_tasks_is_no_work() {
    let pool = Pool::new(2).expect("threads");
    pool.run(0, |_| unreachable!("there is no task"));
}

#[test]
fn items_are_handed_to_their_own_task() {
    let pool = Pool::new(2).expect("threads");
    let mut values = vec![0; 1000];
    pool.run_each(values.iter_mut().collect(), |index, value: &mut usize| {
        *value = index;
    });
    assert!(
        values
            .iter()
            .enumerate()
            .all(|(index, value)| index == *value)
    );
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = Pool::new(2).expect("threads");
    let done = AtomicUsize::new(0);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        pool.run(2, |index| {
            assert!(index != 0, "task 0 fails");
            done.fetch_add(1, Ordering::Relaxed);
        });
    }));
    assert!(outcome.is_err());
    assert_eq!(done.load(Ordering::Relaxed), 1);
    assert_eq!(owners(&pool, 4).len(), 4);
}

#[test]
fn zero_threads_means_one_and_that_is_the_callers() {
    let pool = Pool::new(0).expect("threads");
    assert_eq!(pool.threads(), 1);
    let caller = Some(thread::current().id());
    assert_eq!(owners(&pool, 3), vec![caller; 3]);
}

#[test]
fn a_thread_that_works_on_an_item_does_not_keep_the_others_waiting() {
    let pool = Pool::new(2).expect("threads");
    let (first, rest) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Item 0 ends when all others have: nobody is bound to the thread that holds it.
    pool.run_each(vec![(); 20], |index, ()| {
        if index == 0 {
            while rest.load(Ordering::Acquire) < 19 {
                thread::yield_now();
            }
            first.fetch_add(1, Ordering::Relaxed);
        } else {
            rest.fetch_add(1, Ordering::Release);
        }
    });
    assert_eq!((first.into_inner(), rest.into_inner()), (1, 19));
}

#[test]
fn a_single_item_is_worked_on_by_the_caller() {
    let pool = Pool::new(2).expect("threads");
    let caller = thread::current().id();
    pool.run_each(vec![()], |_, ()| assert_eq!(thread::current().id(), caller));
}

#[test]
fn a_panic_over_an_item_reaches_the_caller_after_all_others_are_done() {
    let pool = Pool::new(2).expect("threads");
    let done = AtomicUsize::new(0);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        pool.run_each(vec![(); 20], |index, ()| {
            assert!(index != 3, "item 3 fails");
            done.fetch_add(1, Ordering::Relaxed);
        });
    }));
    assert!(outcome.is_err());
    assert_eq!(done.into_inner(), 19);
    assert_eq!(owners(&pool, 4).len(), 4);
}

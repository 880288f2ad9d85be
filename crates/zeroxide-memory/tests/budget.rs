//! The books balance and the limit holds.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use zeroxide_memory::{Arena, Bucket, Budget, FramePool, MemoryError, Reservation, Usage, Window};

proptest! {
    #[test]
    fn usage_is_the_sum_of_live_reservations(
        steps in prop::collection::vec((0..Bucket::ALL.len(), 0..600_u64, any::<bool>()), 1..60),
    ) {
        const LIMIT: u64 = 1000;
        let budget = Budget::new(Some(LIMIT));
        let mut live: Vec<Reservation> = Vec::new();
        let mut peaks = [0_u64; Bucket::ALL.len() + 1];
        for (bucket, bytes, release) in steps {
            let bucket = Bucket::ALL[bucket];
            let used: u64 = live.iter().map(Reservation::bytes).sum();
            if release {
                live.pop();
            } else {
                match budget.reserve(bucket, bytes) {
                    Ok(reservation) => {
                        prop_assert!(used + bytes <= LIMIT);
                        live.push(reservation);
                    }
                    Err(MemoryError::OverBudget { bucket: named, need, used: told, limit }) => {
                        prop_assert!(used + bytes > LIMIT);
                        prop_assert_eq!((named, need, told, limit), (bucket, bytes, used, LIMIT));
                    }
                    Err(other) => prop_assert!(false, "{}", other),
                }
            }
            let mut sum = 0;
            for (bucket, peak) in Bucket::ALL.into_iter().zip(&mut peaks[1..]) {
                let of = live.iter().filter(|r| r.bucket() == bucket);
                let current = of.map(Reservation::bytes).sum::<u64>();
                *peak = current.max(*peak);
                prop_assert_eq!(budget.usage(bucket), Usage { current, peak: *peak });
                sum += current;
            }
            peaks[0] = peaks[0].max(sum);
            prop_assert_eq!(budget.total(), Usage { current: sum, peak: peaks[0] });
        }
        live.clear();
        prop_assert_eq!(budget.total().current, 0);
    }
}

#[test]
fn the_limit_holds_under_threads() {
    // Less than one thread alone may hold, so that every schedule has refusals.
    const LIMIT: u64 = 500;
    let budget = Budget::new(Some(LIMIT));
    let done = AtomicBool::new(false);
    let refused = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                assert!(budget.total().current <= LIMIT);
            }
        });
        let workers: Vec<_> = (0..4_u64)
            .map(|worker| {
                let budget = budget.clone();
                scope.spawn(move || {
                    let mut refused = 0_u64;
                    let mut held = Vec::new();
                    for round in 0..20_000_u64 {
                        let bucket = Bucket::ALL
                            [usize::try_from(worker + round).unwrap() % Bucket::ALL.len()];
                        match budget.reserve(bucket, 1 + (round * 7 + worker) % 200) {
                            Ok(reservation) => held.push(reservation),
                            Err(_) => refused += 1,
                        }
                        if held.len() > 3 {
                            held.clear();
                        }
                    }
                    refused
                })
            })
            .collect();
        let refused: u64 = workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum();
        done.store(true, Ordering::SeqCst);
        watcher.join().unwrap();
        refused
    });
    assert!(
        refused > 0,
        "the limit was never reached, so nothing was shown"
    );
    assert!(budget.total().peak <= LIMIT);
    assert_eq!(budget.total().current, 0);
    assert!(
        Bucket::ALL
            .iter()
            .all(|&bucket| budget.usage(bucket).current == 0)
    );
}

#[test]
fn bytes_that_fit_once_are_given_once() {
    let budget = Budget::new(Some(1));
    let start = Barrier::new(2);
    // The most bytes seen in use while holding the only one, over as many rounds as it takes for two
    // threads to meet between any two instructions.
    let worker = || {
        start.wait();
        let rounds = (0..1_000_000).filter_map(|_| budget.reserve(Bucket::Staging, 1).ok());
        rounds.map(|_held| budget.total().current).max()
    };
    let most = thread::scope(|scope| {
        [0, 1]
            .map(|_| scope.spawn(worker))
            .map(|worker| worker.join().unwrap())
    });
    assert!(most.iter().all(|&most| most <= Some(1)), "{most:?}");
    assert_eq!(
        budget.total(),
        Usage {
            current: 0,
            peak: 1
        }
    );
}

#[test]
fn a_sum_past_64_bits_is_over_budget() {
    let budget = Budget::new(None);
    let _most = budget.reserve(Bucket::Weights, u64::MAX - 1).unwrap();
    assert!(matches!(
        budget.reserve(Bucket::Weights, 2),
        Err(MemoryError::OverBudget { .. })
    ));
    let _rest = budget.reserve(Bucket::Gradients, 1).unwrap();
    assert_eq!(budget.total().current, u64::MAX);
}

#[test]
fn what_is_refused_uses_nothing() {
    let limit = 1 << 20;
    let budget = Budget::new(Some(limit));
    let error = Arena::new(&budget, Bucket::Staging, (1 << 20) + 1).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("staging")
            && text.contains("1052672")
            && text.contains("raise the limit by 4096"),
        "{text}"
    );
    assert!(matches!(
        FramePool::new(&budget, Bucket::Gathered, 1),
        Err(MemoryError::OverBudget { .. })
    ));
    let mut window = Window::reserve(2 << 20).unwrap();
    assert!(matches!(
        window.make_home(&budget, Bucket::Weights),
        Err(MemoryError::OverBudget { .. })
    ));
    assert!(!window.is_mapped());
    assert_eq!(
        budget.total(),
        Usage {
            current: 0,
            peak: 0
        }
    );
}

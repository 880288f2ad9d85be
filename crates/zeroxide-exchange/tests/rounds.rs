//! Rounds of gradients between ranks: threads stand for processes, each with a segment of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use zeroxide_exchange::{
    CancelToken, ExchangeError, PeerWait, ReducerPlan, SegmentHandle, SharedMemoryReducer,
};
use zeroxide_memory::{Bucket, Budget, MemoryError};

/// After this, a rank that still waits counts as hung.
const PATIENCE: Duration = Duration::from_secs(10);

fn plan(units: &[usize], slots: usize, held_through_backward: &[usize]) -> ReducerPlan {
    ReducerPlan {
        units: units.to_vec(),
        slots,
        held_through_backward: held_through_backward.to_vec(),
        weights: 0,
        shards: 1,
    }
}

/// Posts that have found one another, and what ends their waiting.
fn joined(world: usize, plan: &ReducerPlan) -> Vec<(SharedMemoryReducer, Arc<CancelToken>)> {
    joined_within(&Budget::new(None), world, plan)
}

/// Ranks that count in one budget.
fn joined_within(
    budget: &Budget,
    world: usize,
    plan: &ReducerPlan,
) -> Vec<(SharedMemoryReducer, Arc<CancelToken>)> {
    let mut reducers: Vec<_> = (0..world)
        .map(|rank| {
            let cancel_token = Arc::new(CancelToken::default());
            let reducer = SharedMemoryReducer::new(
                rank,
                world,
                plan.clone(),
                budget,
                Arc::clone(&cancel_token),
            )
            .expect("memory");
            (reducer, cancel_token)
        })
        .collect();
    let handles: Vec<SegmentHandle> = reducers
        .iter()
        .map(|(reducer, _)| reducer.segment_handle())
        .collect();
    for (reducer, _) in &mut reducers {
        reducer
            .join(&handles)
            .expect("all handles are of this process");
    }
    reducers
}

/// Runs every rank in a thread of its own; a rank that hangs ends with an error instead.
fn each_rank(
    reducers: Vec<(SharedMemoryReducer, Arc<CancelToken>)>,
    act: impl Fn(usize, &mut SharedMemoryReducer) + Sync,
) {
    let done = AtomicBool::new(false);
    let tokens: Vec<_> = reducers
        .iter()
        .map(|(_, cancel_token)| Arc::clone(cancel_token))
        .collect();
    thread::scope(|scope| {
        let watchdog = scope.spawn(|| {
            thread::park_timeout(PATIENCE);
            if !done.load(Ordering::Acquire) {
                for cancel_token in &tokens {
                    cancel_token.cancel("a rank hangs".into(), Vec::new());
                }
            }
        });
        let act = &act;
        let tokens = &tokens;
        let ranks: Vec<_> = reducers
            .into_iter()
            .enumerate()
            .map(|(rank, (mut reducer, _))| {
                scope.spawn(move || {
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        act(rank, &mut reducer);
                    }));
                    if outcome.is_err() {
                        // The others must not wait for it.
                        for cancel_token in tokens {
                            cancel_token.cancel(format!("rank {rank} has panicked"), Vec::new());
                        }
                    }
                    (outcome, reducer)
                })
            })
            .collect();
        let outcomes: Vec<_> = ranks
            .into_iter()
            .map(|rank| rank.join().expect("panics are caught"))
            .collect();
        done.store(true, Ordering::Release);
        watchdog.thread().unpark();
        for (outcome, _) in outcomes {
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

fn byte(rank: usize, unit: usize, round: u64, at: usize) -> u8 {
    let mixed = (rank as u64 + 1) * 1_000_003 + (unit as u64 + 1) * 7919 + round * 104_729;
    #[expect(clippy::cast_possible_truncation, reason = "the low bits are wanted")]
    let low = (mixed
        .wrapping_add(at as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        >> 40) as u8;
    low
}

/// Waits, if there is something to wait for.
fn done(wait: Option<PeerWait>) -> Result<(), ExchangeError> {
    wait.map_or(Ok(()), |wait| wait.wait())
}

/// Small numbers that look random, a stream for each seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).expect("64 bits") % most
    }
}

/// Whether a rank has gradients of a unit in a round: all ranks know, so that they can check one another.
fn has_gradients(seed: u64, rank: usize, unit: usize, round: u64) -> bool {
    Dice(seed ^ ((rank as u64) << 32) ^ ((unit as u64) << 16) ^ round ^ 0x5555_5555).below(4) > 0
}

fn check_round(
    reducer: &mut SharedMemoryReducer,
    seed: u64,
    (rank, world): (usize, usize),
    unit: usize,
    bytes: usize,
    round: u64,
) {
    let share = bytes.div_ceil(world);
    let range = (rank * share).min(bytes)..((rank + 1) * share).min(bytes);
    reducer
        .take::<(), ExchangeError>(unit, range.clone(), |sources| {
            assert_eq!(sources.len(), world);
            for (sender, source) in sources.iter().enumerate() {
                assert_eq!(
                    source.is_some(),
                    has_gradients(seed, sender, unit, round),
                    "rank {rank}, unit {unit}, round {round}: what rank {sender} sent"
                );
                if let Some(source) = source {
                    assert_eq!(source.len(), range.len());
                    for (at, found) in range.clone().zip(*source) {
                        assert_eq!(
                            *found,
                            byte(sender, unit, round, at),
                            "byte {at} of rank {sender}"
                        );
                    }
                }
            }
            Ok(())
        })
        .expect("every rank has sent");
}

/// One rank's part of several rounds, in an order of its own: sends, and takes whatever is ready in between.
fn rounds_of(
    reducer: &mut SharedMemoryReducer,
    seed: u64,
    (rank, world): (usize, usize),
    units: &[usize],
    rounds: u64,
) {
    let mut dice = Dice(seed.wrapping_mul(31) + rank as u64 + 1);
    for round in 1..=rounds {
        let mut order: Vec<usize> = (0..units.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, dice.below(at + 1));
        }
        let mut waiting = Vec::new();
        for unit in order {
            assert_eq!(reducer.round(unit), round);
            assert!(!reducer.is_sent(unit));
            done(reducer.before_filling(unit)).expect("not cancelled");
            let lease = has_gradients(seed, rank, unit, round).then(|| {
                let mut lease = reducer.room(unit).expect("not cancelled");
                for (at, target) in lease.iter_mut().enumerate() {
                    *target = byte(rank, unit, round, at);
                }
                lease
            });
            reducer.send(unit, lease).expect("not cancelled");
            assert!(reducer.is_sent(unit));
            waiting.push(unit);
            if dice.below(3) == 0 {
                thread::sleep(Duration::from_micros(dice.below(300) as u64));
            }
            waiting.retain(|unit| {
                let ready = reducer.is_ready(*unit);
                if ready {
                    check_round(reducer, seed, (rank, world), *unit, units[*unit], round);
                }
                !ready
            });
        }
        while !waiting.is_empty() {
            let unit = waiting.swap_remove(dice.below(waiting.len()));
            done(reducer.before_taking(unit)).expect("not cancelled");
            check_round(reducer, seed, (rank, world), unit, units[unit], round);
        }
    }
}

proptest! {
    // A case that hangs takes long: few are tried to make it smaller.
    #![proptest_config(ProptestConfig {
        cases: 60,
        max_shrink_iters: 4,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Ranks send units in orders of their own, more of them at once than there are slots, and are a round ahead where
    /// nothing holds them. Catches: a slot or stretch given out while another rank reads it, bytes or places of another
    /// round or unit, the word for "nothing" left out, a reader that is not waited for.
    #[test]
    fn every_rank_reads_what_every_rank_has_sent(
        seed in 1_u64..u64::MAX,
        world in 1_usize..5,
        units in prop::collection::vec(1_usize..9000, 1..8),
        slots in 1_usize..4,
        held_through_backward in prop::collection::btree_set(0_usize..8, 0..3),
    ) {
        let held_through_backward: Vec<usize> = held_through_backward.into_iter().filter(|unit| *unit < units.len()).collect();
        let reducers = joined(world, &plan(&units, slots, &held_through_backward));
        each_rank(reducers, |rank, reducer| rounds_of(reducer, seed, (rank, world), &units, 6));
    }
}

/// Catches: room for the next round given out before the others have read the last one.
#[test]
fn a_rank_that_is_ahead_waits_for_those_that_still_read() {
    let reducers = joined(2, &plan(&[64], 1, &[]));
    let read = AtomicBool::new(false);
    each_rank(reducers, |rank, reducer| {
        let mut lease = reducer.room(0).expect("free");
        lease.fill(u8::try_from(rank).expect("small"));
        reducer.send(0, Some(lease)).expect("filled");
        done(reducer.before_taking(0)).expect("not cancelled");
        if rank == 1 {
            thread::sleep(Duration::from_millis(80));
            read.store(true, Ordering::Release);
        }
        reducer
            .take::<(), ExchangeError>(0, 0..64, |sources| {
                assert_eq!(sources[0].expect("sent"), [0; 64]);
                Ok(())
            })
            .expect("ready");
        if rank == 0 {
            done(reducer.before_filling(0)).expect("not cancelled");
            let mut next = reducer.room(0).expect("free again");
            assert!(
                read.load(Ordering::Acquire),
                "rank 1 had not read what lay there"
            );
            next.fill(9);
        }
    });
}

/// Catches: a wait that does not end, or ends without the reason or the ranks.
#[test]
fn calling_off_ends_every_wait_with_its_line_and_ranks() {
    let mut reducers = joined(2, &plan(&[64, 64], 1, &[]));
    let (mut silent, _) = reducers.pop().expect("two");
    let (mut reducer, cancel_token) = reducers.pop().expect("two");
    reducer.send(0, None).expect("nothing before it");
    silent.send(0, None).expect("nothing before it");
    reducer
        .take::<(), ExchangeError>(0, 0..64, |_| Ok(()))
        .expect("both have sent");
    let caller = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        cancel_token.cancel("rank 1 is gone".into(), vec![1]);
        cancel_token.cancel("a later reason".into(), vec![0]);
    });
    // Rank 1 has not read the round that rank 0 wants to follow up.
    let ended = [
        done(reducer.before_filling(0)),
        done(reducer.before_taking(1)),
        done(reducer.before_reading(0, 1)),
    ];
    caller.join().expect("does not panic");
    for outcome in ended {
        match outcome {
            Err(ExchangeError::Stopped { line, ranks }) => {
                assert_eq!((line.as_str(), ranks), ("rank 1 is gone", vec![1]));
            }
            other => panic!("expected the wait to end, got {other:?}"),
        }
    }
    // What need not be waited for is none, and nothing of rank 1's is touched before it is.
    assert!(reducer.before_filling(1).is_none());
    for outcome in [reducer.room(0).map(drop), reducer.send(0, None)] {
        assert!(matches!(outcome, Err(ExchangeError::Misuse { .. })));
    }
}

/// Catches: calls out of turn that corrupt what others read instead of being refused.
#[test]
fn calls_out_of_turn_are_refused_by_name() {
    let mut reducers = joined(2, &plan(&[64], 1, &[]));
    let (reducer, _) = &mut reducers[0];
    let refused = |outcome: Result<(), ExchangeError>, call: &str| match outcome {
        Err(ExchangeError::Misuse { call: found, .. }) => assert_eq!(found, call),
        other => panic!("{call}: expected to be refused, got {other:?}"),
    };
    refused(reducer.take(0, 0..64, |_| Ok(())), "take");
    let lease = reducer.room(0).expect("free");
    refused(reducer.room(0).map(drop), "room");
    refused(reducer.send(0, None), "send");
    reducer.send(0, Some(lease)).expect("filled");
    refused(reducer.send(0, None), "send");
    refused(reducer.room(0).map(drop), "room");
    refused(reducer.take(0, 0..64, |_| Ok(())), "take");
    let handles = [
        reducer.segment_handle(),
        reducer.segment_handle(),
        reducer.segment_handle(),
    ];
    refused(reducer.join(&handles), "join");
}

/// Catches: a version that is believed before every rank has it, weights that ranks do not share.
#[test]
fn weights_are_one_copy_and_new_when_every_rank_says_so() {
    let mut plan = plan(&[64], 1, &[]);
    plan.weights = 8192;
    plan.shards = 3;
    let reducers = joined(3, &plan);
    each_rank(reducers, |rank, reducer| {
        assert!(reducer.before_reading(0, 0).is_none());
        let (segment, start) = reducer.weights();
        assert_eq!(
            start % (2 << 20),
            0,
            "huge pages under weights need an aligned start"
        );
        assert!(segment.payload() >= start + 8192);
        for version in 1..20_u64 {
            reducer.set_version(0, version);
            done(reducer.before_reading(0, version)).expect("not cancelled");
            assert!(reducer.before_reading(0, version - 1).is_none());
            // Only this rank can say it, so nobody can be there.
            assert!(
                reducer.before_reading(0, version + 2).is_some(),
                "rank {rank}"
            );
        }
    });
}

/// Catches: groups that share one copy of the weights, a group that waits for what another's ranks have updated.
#[test]
fn each_shard_group_has_its_own_copy_of_the_weights() {
    use std::os::unix::fs::MetadataExt;
    let mut plan = plan(&[64], 1, &[]);
    plan.weights = 8192;
    plan.shards = 2;
    let reducers = joined(4, &plan);
    let files: Vec<u64> = reducers
        .iter()
        .map(|(reducer, _)| {
            let (segment, start) = reducer.weights();
            assert!(segment.payload() >= start + 8192);
            let path = format!("/proc/self/fd/{}", segment.descriptor());
            std::fs::metadata(path).expect("open").ino()
        })
        .collect();
    assert!(files[0] == files[1] && files[2] == files[3] && files[0] != files[2]);
    let knows = |rank: usize| reducers[rank].0.before_reading(0, 1).is_none();
    for (rank, known) in [
        (0, [false; 4]),
        (2, [false; 4]),
        (1, [true, true, false, false]),
        (3, [true; 4]),
    ] {
        reducers[rank].0.set_version(0, 1);
        assert_eq!([0, 1, 2, 3].map(knows), known, "after rank {rank}");
    }
}

/// Catches: stretches that stay in memory after they were read.
#[test]
fn room_beyond_the_slots_is_given_back() {
    let units = [1 << 20; 6];
    let mut reducers = joined(1, &plan(&units, 1, &[]));
    let (reducer, _) = &mut reducers[0];
    let path = format!("/proc/self/fd/{}", reducer.segment_handle().descriptor);
    let in_use = || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(&path).expect("open").blocks() * 512
    };
    for unit in 0..units.len() {
        let mut lease = reducer.room(unit).expect("free");
        lease.fill(1);
        reducer.send(unit, Some(lease)).expect("filled");
    }
    assert!(in_use() >= 6 << 20);
    for unit in 0..units.len() {
        reducer
            .take::<(), ExchangeError>(unit, 0..1 << 20, |_| Ok(()))
            .expect("ready");
    }
    assert!(in_use() < 2 << 20, "{} bytes are still in use", in_use());
}

#[test]
fn what_is_on_its_way_is_counted_for_as_long_as_it_is() {
    let budget = Budget::new(Some(2 * 300 + 200));
    let mut reducers = joined_within(&budget, 2, &plan(&[300, 200, 100], 1, &[]));
    let counted = |budget: &Budget| budget.usage(Bucket::Gradients).current;
    assert_eq!(counted(&budget), 2 * 300, "a slot of each rank");
    let (receiver, _) = reducers.pop().expect("two ranks");
    let (mut sender, mut receiver) = (reducers.pop().expect("two ranks").0, receiver);

    let in_slot = sender.room(0).expect("the slot is free");
    let in_stretch = sender.room(1).expect("the budget has room");
    assert_eq!(counted(&budget), 2 * 300 + 200);
    let refused = sender
        .room(2)
        .expect_err("neither a slot nor bytes are left");
    assert!(
        matches!(
            refused,
            ExchangeError::Memory(MemoryError::OverBudget { need: 100, .. })
        ),
        "{refused}"
    );
    for (unit, bytes) in [(0, in_slot), (1, in_stretch)] {
        sender.send(unit, Some(bytes)).expect("first of its round");
        receiver.send(unit, None).expect("first of its round");
    }
    assert_eq!(counted(&budget), 2 * 300 + 200, "sent and not yet read");
    for unit in [1, 0] {
        for reducer in [&mut receiver, &mut sender] {
            reducer
                .take(unit, 0..10, |_| Ok::<_, ExchangeError>(()))
                .expect("both have sent");
        }
    }
    assert_eq!(counted(&budget), 2 * 300);
    let room = sender.room(2).expect("all is free again");
    drop((room, sender, receiver));
    assert_eq!(counted(&budget), 0);
}

//! The exchange under schedules that a scheduler draws: ranks are its threads, and whatever one says to the others or
//! hears from them is a point at which another may go on.
//!
//! The protocol is the crate's own source; its words and its sleeping are those of this folder. A schedule in which all
//! sleep is reported as a deadlock, so that no wake may be missing, and what ranks read is looked at twice, so that
//! nobody may write it meanwhile. Orders of memory are not explored: whatever is said is seen at once.

#![deny(unsafe_code)]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "parts of the crate, of which this program uses some"
)]

#[path = "../../src/cancel.rs"]
mod cancel;
#[path = "../../src/error.rs"]
mod error;
mod futex;
#[path = "../../src/peers.rs"]
mod peers;
#[path = "../../src/shm_reduce.rs"]
mod shm_reduce;
mod word;

use std::env;
use std::sync::Arc;

use cancel::CancelToken;
use error::{ExchangeError, Result};
use shm_reduce::{ReducerPlan, SharedMemoryReducer};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;
use shuttle::{Config, MaxSteps, Runner};
use zeroxide_memory::{Budget, Lease};

/// Bytes of a unit's gradients.
const BYTES: usize = 24;
const ROUNDS: u64 = 2;

/// Schedules of each kind; more with `ZEROXIDE_SCHEDULES`.
#[expect(
    clippy::disallowed_methods,
    reason = "who runs the tests says how long"
)]
fn schedules() -> usize {
    let asked = env::var("ZEROXIDE_SCHEDULES").ok();
    asked.map_or(400, |count| count.parse().expect("a number of schedules"))
}

/// Runs `act` under schedules drawn evenly, and under such in which few changes of turn decide (PCT, Burckhardt et al.,
/// ASPLOS 2010).
fn explore(act: impl Fn() + Send + Sync + Copy + 'static) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(50_000);
    Runner::new(RandomScheduler::new(schedules()), config.clone()).run(act);
    Runner::new(PctScheduler::new(3, schedules()), config).run(act);
}

fn joined(world: usize, plan: &ReducerPlan) -> Vec<(SharedMemoryReducer, Arc<CancelToken>)> {
    let mut ranks: Vec<_> = (0..world)
        .map(|rank| {
            let token = Arc::new(CancelToken::default());
            let budget = Budget::new(None);
            let made =
                SharedMemoryReducer::new(rank, world, plan.clone(), &budget, Arc::clone(&token));
            (made.expect("memory"), token)
        })
        .collect();
    let handles: Vec<_> = ranks
        .iter()
        .map(|(rank, _)| rank.segment_handle())
        .collect();
    for (rank, _) in &mut ranks {
        rank.join(&handles)
            .expect("all handles are of this process");
    }
    ranks
}

/// What a rank sends of a unit in a round; every third has nothing.
fn gradients(rank: usize, unit: usize, round: u64) -> Option<u8> {
    let number = rank as u64 + 3 * unit as u64 + 7 * round;
    (!number.is_multiple_of(3)).then(|| u8::try_from(number + 1).expect("small"))
}

fn fill(room: &mut Lease, value: u8) {
    let (first, rest) = room.split_at_mut(BYTES / 2);
    first.fill(value);
    word::step();
    rest.fill(value);
}

fn send(rank: usize, reducer: &mut SharedMemoryReducer, unit: usize) -> Result<()> {
    while let Some(wait) = reducer.before_filling(unit) {
        wait.wait()?;
    }
    let Some(value) = gradients(rank, unit, reducer.round(unit)) else {
        return reducer.send(unit, None);
    };
    let mut room = reducer.room(unit)?;
    fill(&mut room, value);
    reducer.send(unit, Some(room))
}

/// Reads what all have sent, twice.
fn take(world: usize, reducer: &mut SharedMemoryReducer, unit: usize) -> Result<()> {
    while let Some(wait) = reducer.before_taking(unit) {
        wait.wait()?;
    }
    let round = reducer.round(unit);
    let expected: Vec<_> = (0..world)
        .map(|rank| gradients(rank, unit, round).map(|value| vec![value; BYTES]))
        .collect();
    reducer.take(unit, 0..BYTES, |sent| {
        for _ in 0..2 {
            let found: Vec<_> = sent.iter().map(|each| each.map(<[u8]>::to_vec)).collect();
            assert_eq!(found, expected, "unit {unit}, round {round}");
            word::step();
        }
        Ok::<_, ExchangeError>(())
    })
}

/// Every rank in a thread of its own, which `act` is given.
fn each_rank(
    ranks: Vec<(SharedMemoryReducer, Arc<CancelToken>)>,
    act: impl Fn(usize, &mut SharedMemoryReducer) -> Result<()> + Send + Sync + 'static,
) -> Vec<Result<()>> {
    let act = Arc::new(act);
    let threads: Vec<_> = ranks
        .into_iter()
        .enumerate()
        .map(|(rank, (mut reducer, _))| {
            let act = Arc::clone(&act);
            thread::spawn(move || act(rank, &mut reducer))
        })
        .collect();
    threads
        .into_iter()
        .map(|thread| thread.join().expect("no rank panics"))
        .collect()
}

fn plan(units: usize, slots: usize, held_through_backward: &[usize]) -> ReducerPlan {
    ReducerPlan {
        units: vec![BYTES; units],
        slots,
        held_through_backward: held_through_backward.to_vec(),
        weights: 0,
        shards: 1,
    }
}

/// Rounds of two units, which odd ranks send and take in another order, over one slot: what finds it taken goes to its own
/// stretch. Catches: a rank that is not woken, a word that says more than its rank has done, room that is given out
/// before all have read it.
fn rounds(world: usize, held_through_backward: &'static [usize]) {
    let ranks = joined(world, &plan(2, 1, held_through_backward));
    let ended = each_rank(ranks, move |rank, reducer| {
        for _ in 0..ROUNDS {
            let order = if rank % 2 == 0 { [0, 1] } else { [1, 0] };
            for unit in order {
                send(rank, reducer, unit)?;
            }
            for unit in order {
                take(world, reducer, unit)?;
            }
        }
        Ok(())
    });
    assert!(ended.iter().all(Result::is_ok), "{ended:?}");
}

#[test]
fn two_ranks_read_what_both_have_sent() {
    explore(|| rounds(2, &[]));
}

#[test]
fn three_ranks_read_what_all_have_sent() {
    explore(|| rounds(3, &[]));
}

#[test]
fn a_unit_with_a_slot_of_its_own_goes_beside_the_others() {
    explore(|| rounds(3, &[1]));
}

/// A rank sends the next round as soon as it has read the last, however slow the others are.
#[test]
fn a_round_may_begin_while_others_read_the_one_before() {
    explore(|| {
        let ended = each_rank(joined(3, &plan(1, 2, &[])), |rank, reducer| {
            for _ in 0..3 {
                send(rank, reducer, 0)?;
                take(3, reducer, 0)?;
            }
            Ok(())
        });
        assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    });
}

/// A rank whose last word wakes nobody is not waited for by chance. Catches: a wake that is missing and that the next word
/// of the same rank makes up for.
#[test]
fn the_last_word_of_a_rank_is_heard() {
    explore(|| {
        let ended = each_rank(joined(2, &plan(2, 2, &[])), |rank, reducer| {
            send(rank, reducer, 0)?;
            if rank == 1 {
                // Of unit 1 it says that it has sent it, and no more.
                take(2, reducer, 0)?;
                return send(rank, reducer, 1);
            }
            send(rank, reducer, 1)?;
            take(2, reducer, 0)?;
            take(2, reducer, 1)
        });
        assert!(ended.iter().all(Result::is_ok), "{ended:?}");
        let ended = each_rank(joined(2, &plan(1, 2, &[])), |rank, reducer| {
            send(rank, reducer, 0)?;
            take(2, reducer, 0)?;
            // Of round 2 only rank 0 has something to say, when rank 1 has read round 1.
            if rank == 0 {
                send(rank, reducer, 0)?;
            }
            Ok(())
        });
        assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    });
}

/// Readers of shared weights wait for the part of every rank of their group.
#[test]
fn readers_of_weights_wait_for_the_step_of_all_ranks() {
    explore(|| {
        let mut plan = plan(1, 1, &[]);
        (plan.weights, plan.shards) = (64, 3);
        let ended = each_rank(joined(3, &plan), |_, reducer| {
            for version in 1..=3 {
                word::step();
                reducer.set_version(0, version);
                while let Some(wait) = reducer.before_reading(0, version) {
                    wait.wait()?;
                }
            }
            Ok(())
        });
        assert!(ended.iter().all(Result::is_ok), "{ended:?}");
    });
}

/// One of three ranks never sends. Catches: a wait that does not end when it is called off, before or while it sleeps.
#[test]
fn waiting_that_is_called_off_ends() {
    explore(|| {
        let ranks = joined(3, &plan(1, 1, &[]));
        let tokens: Vec<_> = ranks.iter().map(|(_, token)| Arc::clone(token)).collect();
        let threads: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .take(2)
            .map(|(rank, (mut reducer, _))| {
                thread::spawn(move || {
                    send(rank, &mut reducer, 0)?;
                    take(3, &mut reducer, 0)
                })
            })
            .collect();
        word::step();
        for token in &tokens {
            token.cancel("a rank has ended".into(), vec![2]);
        }
        futex::let_time_pass();
        for thread in threads {
            let ended = thread.join().expect("no rank panics");
            assert!(
                matches!(&ended, Err(ExchangeError::Stopped { ranks, .. }) if ranks == &[2]),
                "{ended:?}"
            );
        }
    });
}

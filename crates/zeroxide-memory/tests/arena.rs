//! Leases against a model: one flag per byte, first fit by scanning.

use std::thread;

use proptest::prelude::*;
use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, Lease, MemoryError};

const CAPACITY: usize = 2 * PAGE;

#[derive(Clone, Debug)]
enum Action {
    Lease {
        len: usize,
        align: usize,
    },
    Drop {
        pick: prop::sample::Index,
    },
    Split {
        pick: prop::sample::Index,
        at: prop::sample::Index,
    },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let len = prop_oneof![1..64_usize, 1..2000_usize, Just(PAGE)];
    let align = prop::sample::select(vec![1_usize, 2, 64, 512, PAGE]);
    let action = prop_oneof![
        4 => (len, align).prop_map(|(len, align)| Action::Lease { len, align }),
        3 => any::<prop::sample::Index>().prop_map(|pick| Action::Drop { pick }),
        2 => any::<(prop::sample::Index, prop::sample::Index)>()
            .prop_map(|(pick, at)| Action::Split { pick, at }),
    ];
    prop::collection::vec(action, 1..60)
}

/// A lease and the byte it was filled with: whatever happens elsewhere, that must not change.
struct Held {
    lease: Lease,
    fill: u8,
}

fn first_fit(taken: &[bool], len: usize, align: usize) -> Option<usize> {
    (0..taken.len().saturating_sub(len - 1))
        .step_by(align)
        .find(|&start| taken[start..start + len].iter().all(|&byte| !byte))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn leases_follow_the_model(actions in actions()) {
        let budget = Budget::new(None);
        let arena = Arena::new(&budget, Bucket::Staging, CAPACITY).unwrap();
        let mut taken = vec![false; CAPACITY];
        let mut held: Vec<Held> = Vec::new();
        let mut fill = 0_u8;
        for action in actions {
            match action {
                Action::Lease { len, align } => {
                    fill = fill.wrapping_add(1);
                    match (arena.lease(len, align), first_fit(&taken, len, align)) {
                        (Ok(mut lease), Some(start)) => {
                            prop_assert_eq!((lease.offset(), lease.len()), (start, len));
                            prop_assert_eq!(lease.as_ptr().addr(), arena.base().addr() + start);
                            taken[start..start + len].fill(true);
                            lease.fill(fill);
                            held.push(Held { lease, fill });
                        }
                        (Err(MemoryError::Exhausted { need, free, largest, .. }), None) => {
                            prop_assert_eq!(need, len);
                            prop_assert_eq!(free, taken.iter().filter(|&&byte| !byte).count());
                            let runs = taken.split(|&byte| byte).map(<[bool]>::len);
                            prop_assert_eq!(largest, runs.max().unwrap_or(0));
                        }
                        (result, expected) => prop_assert!(false, "{:?}, model {:?}", result, expected),
                    }
                }
                Action::Drop { pick } if !held.is_empty() => {
                    let gone = held.swap_remove(pick.index(held.len()));
                    taken[gone.lease.offset()..gone.lease.offset() + gone.lease.len()].fill(false);
                }
                Action::Split { pick, at } if !held.is_empty() => {
                    let one = pick.index(held.len());
                    let Held { lease, fill } = &mut held[one];
                    let (at, fill) = (at.index(lease.len() + 1), *fill);
                    let (start, len) = (lease.offset(), lease.len());
                    let rest = lease.split_off(at);
                    prop_assert_eq!((lease.offset(), lease.len()), (start, at));
                    prop_assert_eq!((rest.offset(), rest.len()), (start + at, len - at));
                    held.push(Held { lease: rest, fill });
                }
                Action::Drop { .. } | Action::Split { .. } => {}
            }
            for Held { lease, fill } in &held {
                prop_assert!(lease.iter().all(|byte| byte == fill), "{:?} was overwritten", lease);
            }
            prop_assert_eq!(arena.free().unwrap(), taken.iter().filter(|&&byte| !byte).count());
        }
        held.clear();
        prop_assert_eq!(arena.lease(CAPACITY, PAGE).unwrap().len(), CAPACITY);
    }
}

#[test]
fn memory_outlives_the_arena_while_leased() {
    let budget = Budget::new(Some(CAPACITY as u64));
    let arena = Arena::new(&budget, Bucket::Staging, CAPACITY).unwrap();
    let mut lease = arena.lease(100, 1).unwrap();
    drop(arena);
    lease.fill(7);
    assert_eq!(budget.usage(Bucket::Staging).current, CAPACITY as u64);
    let filled = thread::spawn(move || lease.iter().all(|&byte| byte == 7));
    assert!(filled.join().unwrap());
    assert_eq!(budget.total().current, 0);
}

#[test]
fn the_budget_counts_whole_pages_and_no_more() {
    let budget = Budget::new(None);
    for (bytes, counted) in [(1, PAGE), (PAGE, PAGE), (3 * PAGE - 1, 3 * PAGE)] {
        let arena = Arena::new(&budget, Bucket::Optimizer, bytes).unwrap();
        assert_eq!(budget.usage(Bucket::Optimizer).current, counted as u64);
        assert_eq!(arena.capacity(), counted);
        assert_eq!(arena.base().addr() % (2 << 20), 0);
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let budget = Budget::new(None);
    for bytes in [0, usize::MAX, usize::MAX - PAGE] {
        assert!(
            Arena::new(&budget, Bucket::Staging, bytes).is_err(),
            "{bytes} bytes"
        );
    }
    let arena = Arena::new(&budget, Bucket::Staging, PAGE).unwrap();
    for (len, align) in [(0, 1), (1, 0), (1, 3), (1, 4 << 20)] {
        let refused = arena.lease(len, align);
        assert!(
            matches!(refused, Err(MemoryError::InvalidRequest { .. })),
            "{len} at {align}"
        );
    }
    assert_eq!(budget.total().current, PAGE as u64);
}

#[test]
fn threads_lease_disjoint_ranges() {
    let arena = Arena::new(&Budget::new(None), Bucket::Staging, 64 * PAGE).unwrap();
    thread::scope(|scope| {
        for fill in 1..=4_u8 {
            let arena = arena.clone();
            scope.spawn(move || {
                for round in 0..500 {
                    let Ok(mut lease) = arena.lease(1 + round * 37 % (20 * PAGE), 64) else {
                        continue;
                    };
                    lease.fill(fill);
                    let rest = lease.split_off(lease.len() / 2);
                    assert!(lease.iter().chain(rest.iter()).all(|&byte| byte == fill));
                }
            });
        }
    });
    assert_eq!(arena.free().unwrap(), 64 * PAGE);
    assert!(arena.lease(64 * PAGE, PAGE).is_ok());
}

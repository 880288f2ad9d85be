//! Memory given back while its lease goes on, and memory that belongs to somebody else.

use std::sync::Arc;

use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, Lease};

/// Catches: pages that stay, bytes of a neighbour that go, edges that are not zeroed.
#[test]
fn discarded_bytes_are_zero_and_the_neighbours_keep_theirs() {
    let budget = Budget::new(None);
    let arena = Arena::new(&budget, Bucket::Gradients, 16 * PAGE).expect("small");
    for (before, len) in [
        (64, 100),
        (64, PAGE),
        (PAGE, PAGE),
        (PAGE - 64, 3 * PAGE),
        (192, 5 * PAGE + 64),
    ] {
        let mut left = arena.lease(before, 64).expect("there is room");
        let mut lease = arena.lease(len, 64).expect("there is room");
        let mut right = arena.lease(PAGE, 64).expect("there is room");
        left.fill(1);
        lease.fill(2);
        right.fill(3);
        lease.discard().expect("private memory");
        assert!(lease.iter().all(|byte| *byte == 0), "{before} {len}");
        assert!(left.iter().all(|byte| *byte == 1), "{before} {len}");
        assert!(right.iter().all(|byte| *byte == 3), "{before} {len}");
        lease.fill(4);
        assert!(lease.iter().all(|byte| *byte == 4), "{before} {len}");
    }
}

/// Catches: a foreign lease that lets its owner go too early, or for ever.
#[test]
#[expect(unsafe_code, reason = "foreign memory is promised by its giver")]
fn foreign_memory_lives_as_long_as_its_last_lease() {
    let mut bytes = vec![7_u8; 100];
    let address = bytes.as_mut_ptr();
    let owner = Arc::new(bytes);
    // SAFETY: the vector is kept by the lease, is not touched otherwise, and does not move its bytes.
    let mut lease = unsafe { Lease::foreign(address, 100, Arc::clone(&owner) as Arc<_>) };
    let rest = lease.split_off(40);
    assert_eq!((lease.len(), rest.len()), (40, 60));
    lease.fill(8);
    lease.discard().expect("only zeroed");
    drop(lease);
    assert_eq!(Arc::strong_count(&owner), 2);
    assert!(rest.iter().all(|byte| *byte == 7));
    drop(rest);
    assert_eq!(Arc::strong_count(&owner), 1);
    assert!(owner[..40].iter().all(|byte| *byte == 0));
}

#[test]
fn an_arena_gives_its_memory_back_only_when_nobody_has_a_lease() {
    let budget = Budget::new(None);
    let arena = Arena::new(&budget, Bucket::Staging, 3 * PAGE).unwrap();
    let mut lease = arena.lease(PAGE, PAGE).unwrap();
    lease.fill(7);
    assert!(!arena.discard_if_free().unwrap());
    assert!(lease.iter().all(|byte| *byte == 7));
    drop(lease);
    assert!(arena.discard_if_free().unwrap());
    let lease = arena.lease(3 * PAGE, PAGE).unwrap();
    assert!(lease.iter().all(|byte| *byte == 0));
}

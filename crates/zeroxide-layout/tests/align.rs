//! Rounding up.

use proptest::prelude::*;
use zeroxide_layout::{align_up, checked_align_up};

proptest! {
    #[test]
    fn rounding_up_is_the_least_multiple(n in 0..u64::MAX / 2, align in 1..1_u64 << 40) {
        let up = align_up(n, align);
        prop_assert!(up >= n && up - n < align && up.is_multiple_of(align));
    }
}

#[test]
fn overflow_is_an_error() {
    assert_eq!(checked_align_up(u64::MAX, 2), None);
    assert_eq!(checked_align_up(1, 0), None);
}

//! Extents are aligned, disjoint and found again.

use std::collections::HashSet;

use proptest::prelude::*;
use zeroxide_layout::{
    BlockId, ExtentMap, LayoutError, PAGE, StateKey, align_up, checked_align_up,
};

const KEYS: [StateKey; 4] = [
    StateKey::WEIGHT,
    StateKey::RESIDUAL,
    StateKey::new("exp_avg"),
    StateKey::new("sum"),
];

fn blocks() -> impl Strategy<Value = Vec<(BlockId, u64)>> {
    let block = (0..8_u32, prop::sample::select(KEYS.to_vec()))
        .prop_map(|(unit, key)| BlockId { unit, key });
    let bytes = prop_oneof![Just(0_u64), Just(1), Just(PAGE as u64), 0..1_000_000_u64];
    prop::collection::hash_map(block, bytes, 0..30).prop_map(|map| map.into_iter().collect())
}

proptest! {
    #[test]
    fn extents_are_disjoint_aligned_and_found(blocks in blocks()) {
        let map = ExtentMap::new(&blocks).unwrap();
        prop_assert_eq!(map.len(), blocks.len());
        let mut end = 0;
        for ((listed, bytes), (block, extent)) in blocks.iter().zip(map.iter()) {
            prop_assert_eq!((*listed, *bytes), (block, extent.bytes));
            prop_assert_eq!(map.get(block), Some(extent));
            prop_assert_eq!(extent.offset % PAGE as u64, 0);
            prop_assert!(extent.offset >= end && extent.offset - end < PAGE as u64);
            end = extent.end();
        }
        prop_assert_eq!(map.total_bytes(), align_up(end, PAGE as u64));
    }

    #[test]
    fn an_unlisted_block_has_no_extent(blocks in blocks(), unit in 0..8_u32) {
        let map = ExtentMap::new(&blocks).unwrap();
        let listed: HashSet<BlockId> = blocks.iter().map(|(block, _)| *block).collect();
        for key in KEYS {
            let block = BlockId { unit, key };
            prop_assert_eq!(map.get(block).is_some(), listed.contains(&block));
        }
    }

    #[test]
    fn rounding_up_is_the_least_multiple(n in 0..u64::MAX / 2, align in 1..1_u64 << 40) {
        let up = align_up(n, align);
        prop_assert!(up >= n && up - n < align && up.is_multiple_of(align));
    }
}

#[test]
fn a_block_listed_twice_is_named() {
    let block = BlockId {
        unit: 3,
        key: StateKey::new("exp_avg"),
    };
    let error = ExtentMap::new(&[(block, 1), (block, 1)]).unwrap_err();
    assert_eq!(error, LayoutError::DuplicateBlock { block });
    assert!(error.to_string().contains("unit 3 exp_avg"), "{error}");
}

#[test]
fn overflow_is_an_error() {
    let block = |unit| BlockId {
        unit,
        key: StateKey::WEIGHT,
    };
    let half = 1_u64 << 62;
    for sizes in [vec![u64::MAX], vec![half, half], vec![i64::MAX as u64]] {
        let blocks: Vec<_> = (0..)
            .zip(sizes)
            .map(|(unit, bytes)| (block(unit), bytes))
            .collect();
        assert_eq!(
            ExtentMap::new(&blocks),
            Err(LayoutError::TooLarge { what: "extent map" })
        );
    }
    assert_eq!(checked_align_up(u64::MAX, 2), None);
    assert_eq!(checked_align_up(1, 0), None);
}

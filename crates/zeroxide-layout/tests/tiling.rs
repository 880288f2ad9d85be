//! Tiles cover a shard exactly once.

use proptest::prelude::*;
use zeroxide_layout::{LayoutError, TILE_QUANTUM, Tiling};

proptest! {
    #[test]
    fn tiles_cover_exactly_once(len in 0..400_u64, tile in 1..50_u64, at in any::<prop::sample::Index>()) {
        let (len, tile) = (len * TILE_QUANTUM, tile * TILE_QUANTUM);
        let tiling = Tiling::new(len, tile).unwrap();
        let mut end = 0;
        for index in 0..tiling.count() {
            let range = tiling.range(index);
            prop_assert_eq!(range.start, end);
            prop_assert!(range.start < range.end);
            let short = index + 1 == tiling.count();
            prop_assert!(range.end - range.start == tile || (short && range.end - range.start < tile));
            prop_assert_eq!((range.end - range.start) % TILE_QUANTUM, 0);
            for element in [range.start, range.end - 1] {
                prop_assert_eq!(tiling.tile_of(element), index);
            }
            end = range.end;
        }
        prop_assert_eq!(end, len);
        if len > 0 {
            let element = at.index(usize::try_from(len).unwrap()) as u64;
            prop_assert!(tiling.range(tiling.tile_of(element)).contains(&element));
        }
    }

    #[test]
    fn what_is_not_whole_quanta_is_refused(len in any::<u64>(), tile in any::<u64>()) {
        let whole = |n: u64| n.is_multiple_of(TILE_QUANTUM);
        prop_assume!(!whole(len) || !whole(tile) || tile == 0);
        let refused = Tiling::new(len, tile);
        prop_assert!(matches!(refused, Err(LayoutError::TileQuantum { .. })), "{:?}", refused);
    }
}

#[test]
fn the_largest_length_does_not_overflow() {
    let len = u64::MAX / TILE_QUANTUM * TILE_QUANTUM;
    let tile = 1 << 40;
    let tiling = Tiling::new(len, tile).unwrap();
    assert_eq!(tiling.range(tiling.count() - 1).end, len);
    assert_eq!(
        Tiling::new(len, TILE_QUANTUM),
        Err(LayoutError::TooLarge { what: "tile count" })
    );
}

#[test]
fn a_tile_of_zero_is_refused() {
    let error = Tiling::new(TILE_QUANTUM, 0).unwrap_err();
    assert_eq!(
        error,
        LayoutError::TileQuantum {
            what: "tile",
            got: 0,
            quantum: TILE_QUANTUM
        }
    );
}

#[test]
#[should_panic(expected = "tile 1 of 1")]
fn a_tile_past_the_last_panics() {
    let _ = Tiling::new(TILE_QUANTUM, TILE_QUANTUM).unwrap().range(1);
}

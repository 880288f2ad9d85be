//! The flat layout of a unit, against its definition.

use proptest::prelude::*;
use zeroxide_layout::{
    LayoutError, Location, PAGE, PARAM_ALIGN, ParamShape, SHARD_ALIGN, UnitLayout,
};

fn shapes() -> impl Strategy<Value = Vec<ParamShape>> {
    let numel = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(PARAM_ALIGN),
        Just(SHARD_ALIGN),
        0..20_000_u64
    ];
    let shape =
        (numel, any::<bool>()).prop_map(|(numel, trainable)| ParamShape { numel, trainable });
    prop::collection::vec(shape, 0..12)
}

fn worlds() -> impl Strategy<Value = u32> {
    prop_oneof![Just(1_u32), Just(2), Just(3), 1..20_u32]
}

/// For each element of the flat layout, the (parameter, element) it belongs to, by the definition.
fn owners(layout: &UnitLayout) -> Vec<Option<(usize, u64)>> {
    let len = usize::try_from(layout.len()).expect("small in these tests");
    let mut owners = vec![None; len];
    for param in 0..layout.params() {
        for element in 0..layout.numel(param) {
            let at = usize::try_from(layout.offset(param) + element).expect("small");
            assert_eq!(owners[at], None, "two parameters share element {at}");
            owners[at] = Some((param, element));
        }
    }
    owners
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn parameters_are_aligned_disjoint_and_in_order(shapes in shapes(), world in worlds()) {
        let layout = UnitLayout::new(&shapes, world).unwrap();
        owners(&layout);
        for (param, shape) in shapes.iter().enumerate() {
            let range = layout.offset(param)..layout.offset(param) + shape.numel;
            prop_assert_eq!(layout.numel(param), shape.numel);
            prop_assert_eq!(range.start % PARAM_ALIGN, 0);
            let part = if shape.trainable {
                prop_assert!(layout.trainable_len() > 0);
                0..layout.trainable_len()
            } else {
                prop_assert!(layout.len() > layout.trainable_len());
                layout.trainable_len()..layout.len()
            };
            prop_assert!(part.start <= range.start && range.end <= part.end);
        }
        for trainable in [true, false] {
            let group: Vec<usize> =
                (0..shapes.len()).filter(|&p| shapes[p].trainable == trainable).collect();
            prop_assert!(group.windows(2).all(|w| layout.offset(w[0]) <= layout.offset(w[1])));
        }
    }

    #[test]
    fn padding_is_the_least_that_aligns(shapes in shapes(), world in worlds()) {
        let layout = UnitLayout::new(&shapes, world).unwrap();
        let mut end = 0_u64;
        for (trainable, expected) in [(true, layout.trainable_len()), (false, layout.len())] {
            let start = end;
            let part = || shapes.iter().filter(|s| s.trainable == trainable);
            for shape in part() {
                end = end.next_multiple_of(PARAM_ALIGN) + shape.numel;
            }
            // A part with a parameter is never empty.
            end = end.max(start + u64::from(part().count() > 0));
            end = end.next_multiple_of(SHARD_ALIGN * u64::from(world));
            prop_assert_eq!(end, expected);
        }
    }

    #[test]
    fn shards_cover_each_part_once_in_equal_pages(shapes in shapes(), world in worlds()) {
        let layout = UnitLayout::new(&shapes, world).unwrap();
        let (mut end, mut trainable_end) = (0, 0);
        for rank in 0..world {
            let (shard, trainable) = (layout.shard(rank), layout.trainable_shard(rank));
            prop_assert_eq!(shard.start, end);
            prop_assert_eq!(trainable.start, trainable_end);
            (end, trainable_end) = (shard.end, trainable.end);
            prop_assert_eq!(2 * (shard.end - shard.start) % PAGE as u64, 0);
            prop_assert_eq!(2 * (trainable.end - trainable.start) % PAGE as u64, 0);
            prop_assert_eq!(shard.end - shard.start, layout.len() / u64::from(world));
        }
        prop_assert_eq!((end, trainable_end), (layout.len(), layout.trainable_len()));
    }

    #[test]
    fn pieces_in_any_range_are_the_owned_elements(
        shapes in shapes(), world in worlds(), a in any::<prop::sample::Index>(), b in any::<prop::sample::Index>(),
    ) {
        let layout = UnitLayout::new(&shapes, world).unwrap();
        let owners = owners(&layout);
        let (a, b) = (a.index(owners.len() + 1), b.index(owners.len() + 1));
        let range = a.min(b)..a.max(b);
        let mut found = vec![None; owners.len()];
        for piece in layout.params_in(range.start as u64..range.end as u64) {
            prop_assert!(piece.range.start < piece.range.end);
            for (i, at) in piece.range.clone().enumerate() {
                let at = usize::try_from(at).unwrap();
                prop_assert!(range.contains(&at) && found[at].is_none());
                found[at] = Some((piece.param, piece.offset_in_param + i as u64));
            }
        }
        prop_assert_eq!(&found[range.clone()], &owners[range]);
    }

    #[test]
    fn locate_is_the_inverse_of_shard_and_offset(
        shapes in shapes(), world in worlds(), pick in any::<prop::sample::Index>(),
    ) {
        let layout = UnitLayout::new(&shapes, world).unwrap();
        for (param, shape) in shapes.iter().enumerate().filter(|(_, s)| s.numel > 0) {
            let random = pick.index(usize::try_from(shape.numel).unwrap()) as u64;
            for element in [0, random, shape.numel - 1] {
                let flat = layout.offset(param) + element;
                let Location { rank, offset_in_shard } = layout.locate(param, element).unwrap();
                prop_assert!(layout.shard(rank).contains(&flat));
                prop_assert_eq!(layout.shard(rank).start + offset_in_shard, flat);
                match layout.locate_trainable(param, element) {
                    Ok(Location { rank, offset_in_shard }) => {
                        prop_assert!(shape.trainable);
                        prop_assert!(layout.trainable_shard(rank).contains(&flat));
                        prop_assert_eq!(layout.trainable_shard(rank).start + offset_in_shard, flat);
                    }
                    Err(error) => {
                        prop_assert!(!shape.trainable);
                        prop_assert_eq!(error, LayoutError::Frozen { param });
                    }
                }
            }
            let past = layout.locate(param, shape.numel);
            prop_assert!(matches!(past, Err(LayoutError::NoSuchElement { .. })), "{:?}", past);
        }
        let missing = layout.locate(shapes.len(), 0);
        prop_assert!(matches!(missing, Err(LayoutError::NoSuchElement { .. })), "{:?}", missing);
    }

    #[test]
    fn a_size_past_the_file_offsets_is_an_error(excess in 0..u64::MAX / 2, split in any::<bool>()) {
        let most = i64::MAX as u64 / 4;
        let over = most.saturating_add(excess).saturating_add(1);
        let shape = |numel, trainable| ParamShape { numel, trainable };
        let shapes =
            if split { vec![shape(most, true), shape(over, false)] } else { vec![shape(over, true)] };
        let error = UnitLayout::new(&shapes, 1).unwrap_err();
        prop_assert_eq!(error, LayoutError::TooLarge { what: "unit layout" });
    }
}

#[test]
fn a_layout_by_hand() {
    let shape = |numel, trainable| ParamShape { numel, trainable };
    let shapes = [
        shape(100, true),
        shape(7, false),
        shape(4000, true),
        shape(1, false),
    ];
    let layout = UnitLayout::new(&shapes, 2).unwrap();
    // 100 -> 128, + 4000 = 4128 -> 8192; frozen 7 at 8192, 1 at 8256 -> 12288.
    let offsets: Vec<u64> = (0..4).map(|p| layout.offset(p)).collect();
    assert_eq!(offsets, [0, 8192, 128, 8256]);
    assert_eq!((layout.trainable_len(), layout.len()), (8192, 12288));
    assert_eq!(
        (layout.shard(1), layout.trainable_shard(1)),
        (6144..12288, 4096..8192)
    );
    assert_eq!(
        layout.locate(1, 0),
        Ok(Location {
            rank: 1,
            offset_in_shard: 8192 - 6144
        })
    );
}

#[test]
fn no_ranks_is_an_error() {
    assert_eq!(UnitLayout::new(&[], 0), Err(LayoutError::EmptyWorld));
}

#[test]
#[should_panic(expected = "rank 2 is outside a world of 2")]
fn a_rank_outside_the_world_panics() {
    let layout = UnitLayout::new(
        &[ParamShape {
            numel: 1,
            trainable: true,
        }],
        2,
    )
    .unwrap();
    let _ = layout.shard(2);
}

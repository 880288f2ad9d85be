//! What travels as integers: memory and bytes against sums written out here by hand. That ranks send just these is shown
//! by `tests/distributed/test_quantised.py`.

use proptest::prelude::*;
use zeroxide_layout::{Dtype, ParamShape};
use zeroxide_plan::{
    Collective, CollectiveKind, Dtypes, Mesh, Plan, PlanRequest, Quantisation, Schedule,
    StateBytes, Transport, UnitRequest,
};

/// Units of `numel` trainable elements each, on ranks at stage 3.
fn plan(mesh: Mesh, quantisation: Quantisation, numels: &[u64]) -> Plan {
    let unit = |(index, numel): (usize, &u64)| UnitRequest {
        mesh: None,
        name: format!("unit {index}"),
        params: vec![ParamShape {
            numel: *numel,
            trainable: true,
        }],
        held_through_backward: false,
        state_bytes: StateBytes::default(),
        turn: u32::try_from(index).expect("few"),
    };
    Plan::new(PlanRequest {
        mesh,
        stage: 3,
        transport: Transport::Collective,
        dtypes: Dtypes {
            compute: Dtype::Bf16,
            grad: Dtype::F32,
            comm: Dtype::Bf16,
        },
        quantisation,
        weights_on_disk: false,
        state_on_disk: false,
        gradients: None,
        pinned: 0,
        units: numels.iter().enumerate().map(unit).collect(),
        prefetch: 1,
        tile_bytes: None,
        staging_bytes: None,
        limit: None,
        resident: 0,
        device: None,
    })
    .expect("nothing is limited")
}

fn flat(world: u32) -> Mesh {
    Mesh {
        rank: 0,
        shards: world,
        replicas: 1,
    }
}

fn all(near: u32, units: usize, feedback: bool) -> Quantisation {
    Quantisation {
        near,
        weights: vec![true; units],
        gradients: true,
        feedback,
    }
}

fn padded(numel: u64, world: u64) -> u64 {
    numel.div_ceil(2048 * world) * 2048 * world
}

fn across(found: &[Collective]) -> u64 {
    found.iter().map(|each| each.across).sum()
}

proptest! {
    /// Catches: codes counted for another group than its own, residuals of the slice that the rank sums itself, and sums
    /// of one slice where the first hop has one for each group.
    #[test]
    fn every_byte_is_in_its_bucket(
        near in 1..5_u32, far in 1..4_u32, feedback: bool, grouped: bool,
        numels in prop::collection::vec(1..3_000_000_u64, 1..5),
    ) {
        prop_assume!(near * far > 1 && !(grouped && (near == 1 || far == 1)));
        let world = u64::from(near * far);
        // Shard groups are groups; without them the secondary partition has its own.
        let mesh = if grouped { Mesh { rank: 0, shards: near, replicas: far } } else { flat(near * far) };
        let quantisation = all(if grouped { 0 } else { near }, numels.len(), feedback);
        let far = u64::from(far);
        let exact = plan(mesh, Quantisation { near: quantisation.near, ..Quantisation::default() }, &numels);
        let made = plan(mesh, quantisation, &numels);
        let slices: Vec<u64> = numels.iter().map(|numel| padded(*numel, world) / world).collect();
        let total: u64 = slices.iter().sum();
        // A byte an element and two for each 256: of all slices that a rank keeps for its group, be they one shard.
        let page = |bytes: u64| bytes.div_ceil(4096) * 4096;
        let codes = page(total * far + total * far / 128);
        prop_assert_eq!(made.buckets.weights - exact.buckets.weights, codes);
        let most = *slices.iter().max().expect("a unit");
        let message = most / 2 + most / 128;
        let incoming = page(4 * most * far + message * (world - 1));
        let residuals = page(if feedback { total * (world - 1) * 2 } else { 0 });
        let before = page(most * 2 * (world - 1));
        prop_assert_eq!(made.buckets.gradients + before, exact.buckets.gradients + incoming + residuals);
    }

    /// Catches: a hop that is left out, or made twice in a step; bytes of another group's size.
    #[test]
    fn each_value_crosses_once_as_an_integer(
        near in 2..5_u32, far in 2..4_u32, numels in prop::collection::vec(1..3_000_000_u64, 1..6),
    ) {
        let world = u64::from(near * far);
        let made = plan(flat(near * far), all(near, numels.len(), false), &numels);
        let found = Schedule::new(&made).collectives;
        for (unit, numel) in numels.iter().enumerate() {
            let slice = padded(*numel, world) / world;
            let (int8, int4) = (slice + slice / 128, slice / 2 + slice / 128);
            let (near, far) = (u64::from(near), u64::from(far));
            let of = |kind| found.iter().filter(move |each| each.unit == unit && each.kind == kind);
            let hops: Vec<u64> = of(CollectiveKind::AllGatherAcross).map(|each| each.across).collect();
            prop_assert_eq!(hops, vec![int8 * (far - 1)], "once, whatever backward gathers");
            for each in of(CollectiveKind::AllGather) {
                prop_assert_eq!((each.sent, each.across), (int8 * far * (near - 1), 0));
            }
            let sent: Vec<u64> = of(CollectiveKind::AllToAll).map(|each| each.sent).collect();
            prop_assert_eq!(sent, vec![int4 * far * (near - 1)]);
            let sent: Vec<u64> = of(CollectiveKind::AllToAllAcross).map(|each| each.across).collect();
            prop_assert_eq!(sent, vec![int4 * (far - 1)]);
        }
        let first = |kind| found.iter().position(|each: &Collective| each.kind == kind);
        prop_assert!(first(CollectiveKind::AllToAll) < first(CollectiveKind::AllToAllAcross));
    }
}

/// `ZeRO++` (Wang et al. 2023, table 1): what enters a group in a step, in units of the model's bytes that other groups
/// have: 0.5 for weights, once, and 0.25 for gradients. Plain sharding sends weights twice and gradients once, all in 16
/// bits, and each of the `near` ranks of a group takes its own copy from other groups, and sends its own gradients there.
#[test]
fn three_quarters_of_the_model_cross_where_three_times_as_much_crossed_for_each_rank() {
    const BLOCKS: usize = 24;
    let numels = [7_077_000; BLOCKS];
    let (near, far) = (8_u32, 4_u32);
    let model = 2 * numels.iter().sum::<u64>();
    let elsewhere = model / u64::from(far) * u64::from(far - 1);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let entering = |plan: &Plan| {
        let sent = across(&Schedule::new(plan).collectives) * u64::from(near);
        sent as f64 / elsewhere as f64
    };
    let exact = Quantisation {
        near,
        ..Quantisation::default()
    };
    let plain = entering(&plan(flat(near * far), exact.clone(), &numels)) / f64::from(near);
    // The two units that memory has room for are there when backward begins: they are gathered once.
    #[expect(clippy::cast_precision_loss, reason = "small")]
    let expected = 3.0 - 2.0 / BLOCKS as f64;
    assert!((plain - expected).abs() < 0.001 * expected, "{plain}");
    let found = entering(&plan(flat(near * far), all(near, BLOCKS, true), &numels));
    assert!((found - 0.75).abs() < 0.02 * 0.75, "{found}");
    let weights = Quantisation {
        gradients: false,
        ..all(near, BLOCKS, false)
    };
    let found = entering(&plan(flat(near * far), weights, &numels)) - f64::from(near);
    assert!((found - 0.5).abs() < 0.02 * 0.5, "weights alone: {found}");
}

//! The schedule against what each mode must exchange, counted out here. That it is also what ranks really exchange is
//! shown by `tests/distributed/test_schedule.py`.

use proptest::prelude::*;
use zeroxide_layout::{Dtype, ParamShape};
use zeroxide_plan::{
    Collective, CollectiveKind, Dtypes, Mesh, Pass, Phase, Plan, PlanRequest, Quantisation,
    Schedule, StateBytes, Transport, UnitRequest,
};

/// One root unit held through backward and `blocks` others of `numel` elements, one turn each.
fn plan(world: u32, stage: u8, transport: Transport, blocks: &[u64], prefetch: usize) -> Plan {
    planned(world, stage, transport, blocks, prefetch, false)
}

/// The same with weights on disk or not.
fn planned(
    world: u32,
    stage: u8,
    transport: Transport,
    blocks: &[u64],
    prefetch: usize,
    weights_on_disk: bool,
) -> Plan {
    let (shards, replicas) = if stage == 0 { (1, world) } else { (world, 1) };
    let mesh = Mesh {
        rank: 0,
        shards,
        replicas,
    };
    grouped(mesh, stage, transport, blocks, prefetch, weights_on_disk)
}

/// The same for ranks in groups.
fn grouped(
    mesh: Mesh,
    stage: u8,
    transport: Transport,
    blocks: &[u64],
    prefetch: usize,
    weights_on_disk: bool,
) -> Plan {
    let unit = |index: usize, numel: u64| UnitRequest {
        mesh: None,
        name: format!("unit {index}"),
        params: vec![ParamShape {
            numel,
            trainable: true,
        }],
        held_through_backward: index == 0,
        state_bytes: StateBytes::default(),
        turn: u32::try_from(index).expect("few"),
    };
    let root = std::iter::once(unit(0, 100));
    Plan::new(PlanRequest {
        mesh,
        stage,
        transport,
        dtypes: Dtypes {
            compute: Dtype::Bf16,
            grad: Dtype::F32,
            comm: Dtype::F32,
        },
        quantisation: Quantisation::default(),
        weights_on_disk,
        state_on_disk: false,
        gradients: None,
        pinned: 0,
        units: root
            .chain(
                blocks
                    .iter()
                    .enumerate()
                    .map(|(at, numel)| unit(at + 1, *numel)),
            )
            .collect(),
        prefetch,
        tile_bytes: None,
        staging_bytes: None,
        limit: None,
        resident: 0,
        device: None,
    })
    .expect("nothing is limited")
}

fn steps(plan: &Plan) -> Vec<Collective> {
    Schedule::new(plan).collectives
}

fn units_of(all: &[Collective], kind: CollectiveKind, phase: Phase) -> Vec<usize> {
    all.iter()
        .filter(|each| each.kind == kind && each.phase == phase)
        .map(|each| each.unit)
        .collect()
}

/// Bytes of a padded unit of `numel` elements of `size` bytes that a rank sends to all others, its own part left out.
fn others(numel: u64, world: u64, size: u64) -> u64 {
    numel.max(1).div_ceil(2048 * world) * 2048 * size * (world - 1)
}

proptest! {
    #[test]
    fn every_unit_is_gathered_in_forward_and_reduced_in_backward(
        world in 2..9_u32, blocks in prop::collection::vec(1..3_000_000_u64, 1..8), prefetch in 0..4_usize,
    ) {
        let plan = plan(world, 3, Transport::Collective, &blocks, prefetch);
        let found = steps(&plan);
        let count = blocks.len();
        // In order: what is gathered ahead is what comes next.
        let forward = units_of(&found, CollectiveKind::AllGather, Phase::Forward);
        prop_assert_eq!(forward, (0..=count).collect::<Vec<_>>());
        let mut backward = units_of(&found, CollectiveKind::AllGather, Phase::Backward);
        prop_assert!(!backward.contains(&0), "the root is held");
        prop_assert!(!backward.contains(&count), "the last one of forward is still there");
        backward.reverse();
        prop_assert!(backward.is_sorted_by(|a, b| a < b), "each at most once, in reverse");
        let reduced = units_of(&found, CollectiveKind::AllToAll, Phase::Backward);
        prop_assert_eq!(reduced, (1..=count).rev().chain([0]).collect::<Vec<_>>());
        for each in &found {
            let numel = if each.unit == 0 { 100 } else { blocks[each.unit - 1] };
            let size = if each.kind == CollectiveKind::AllToAll { 4 } else { 2 };
            prop_assert_eq!(each.sent, others(numel, u64::from(world), size));
        }
    }

    #[test]
    fn weights_on_disk_are_gathered_again_for_every_use(
        world in 2..9_u32, shared: bool, blocks in prop::collection::vec(1..3_000_000_u64, 1..8), prefetch in 0..4_usize,
    ) {
        let transport = if shared { Transport::Shared } else { Transport::Collective };
        let plan = planned(world, 3, transport, &blocks, prefetch, true);
        let found = steps(&plan);
        let count = blocks.len();
        // What is sent for at the end of forward is let go when backward begins with the root, and sent for again.
        for unit in 0..=count {
            let times = found
                .iter()
                .filter(|each| each.kind == CollectiveKind::AllGather && each.unit == unit)
                .count();
            let least = if unit == 0 { 1 } else { 2 };
            prop_assert!(times == least || (unit > 0 && times == 3 && prefetch > 0), "unit {} {} times", unit, times);
        }
        let reduced = units_of(&found, CollectiveKind::AllToAll, Phase::Backward);
        prop_assert_eq!(reduced.len(), if shared { 0 } else { count + 1 });
    }

    #[test]
    fn one_rank_reads_state_once_and_weights_that_did_not_stay_twice(
        count in 1..12_usize, frames in 1..4_u64, prefetch in 0..4_usize,
    ) {
        // Whole frames of bf16 weights in each block.
        let numel = frames << 20;
        let plan = planned(1, 3, Transport::Shared, &vec![numel; count], prefetch, true);
        let found = Schedule::new(&plan);
        prop_assert_eq!(found.sent_bytes(), 0);
        // The root stays, and beside it as many blocks as there are frames for: at the turn from forward to backward, and
        // from a step to the next.
        let stay = (plan.gathered_bytes - (2 << 20)) / (2 * numel);
        let read = 2 * (count as u64).saturating_sub(stay) * 2 * numel;
        prop_assert_eq!(found.read_bytes, read);
        // There is no state here, but all weights are written.
        prop_assert_eq!(found.written_bytes, 2 * (count as u64 * numel + 2048));
    }

    #[test]
    fn memory_for_all_saves_the_gathers_of_backward(world in 2..9_u32, count in 1..8_usize) {
        let blocks = vec![2_000_000; count];
        let roomy = plan(world, 3, Transport::Collective, &blocks, count);
        let found = steps(&roomy);
        prop_assert_eq!(units_of(&found, CollectiveKind::AllGather, Phase::Backward), Vec::<usize>::new());
        let disk = Schedule::new(&roomy);
        prop_assert_eq!((disk.read_bytes, disk.written_bytes), (0, 0));
        // With room for a single block, all but the last one of forward are gathered again.
        let tight = plan(world, 3, Transport::Collective, &blocks, 0);
        let again = units_of(&steps(&tight), CollectiveKind::AllGather, Phase::Backward);
        prop_assert_eq!(again, (1..count).rev().collect::<Vec<_>>());
    }

    #[test]
    fn lower_stages_gather_after_the_step(
        world in 2..9_u32, stage in 0..3_u8, blocks in prop::collection::vec(1..3_000_000_u64, 1..8),
    ) {
        let plan = plan(world, stage, Transport::Collective, &blocks, 1);
        let found = steps(&plan);
        let reduce = if stage == 0 { CollectiveKind::AllGatherGradients } else { CollectiveKind::AllToAll };
        let count = blocks.len();
        prop_assert_eq!(units_of(&found, reduce, Phase::Backward), (1..=count).rev().chain([0]).collect::<Vec<_>>());
        let gathered = units_of(&found, CollectiveKind::AllGather, Phase::Step);
        prop_assert_eq!(gathered, if stage == 0 { vec![] } else { (0..=count).collect() });
        let world = u64::from(world);
        // A rank that keeps everything sends all of its gradients to each of the others.
        let times = if stage == 0 { world } else { 1 };
        let expected: u64 = blocks.iter().chain([&100]).map(|numel| {
            others(*numel, world, 4) * times + if stage == 0 { 0 } else { others(*numel, world, 2) }
        }).sum();
        prop_assert_eq!(found.iter().map(|each| each.sent).sum::<u64>(), expected);
    }
}

#[test]
fn shared_memory_needs_no_collective() {
    for stage in 0..4 {
        let plan = plan(3, stage, Transport::Shared, &[5000, 7000], 1);
        let found = Schedule::new(&plan);
        assert_eq!(found.collectives, []);
        // The others read what they keep: a third each, or at stage 0 everything.
        let times = if stage == 0 { 3 } else { 1 };
        let gradients = others(100, 3, 4) + others(5000, 3, 4) + others(7000, 3, 4);
        assert_eq!(found.sent_bytes(), gradients * times);
        assert_eq!(found.across_bytes(), 0);
    }
}

/// Catches: a gather over all ranks, sums of replicas that are left out or sent before they can have been taken.
#[test]
fn groups_keep_weights_to_themselves_and_exchange_gradients_and_sums() {
    let numels = [100, 5000, 70_000];
    for (shards, replicas) in [(2_u32, 2_u32), (4, 2), (2, 4)] {
        let world = u64::from(shards * replicas);
        let slice = |numel: u64| numel.div_ceil(2048 * world) * 2048;
        let slices: u64 = numels.map(slice).iter().sum();
        for transport in [Transport::Collective, Transport::Shared] {
            let mesh = Mesh {
                rank: 1,
                shards,
                replicas,
            };
            let plan = grouped(mesh, 3, transport, &numels[1..], 0, false);
            let found = Schedule::new(&plan);
            let far = world - u64::from(shards);
            if transport == Transport::Shared {
                // Each of the others reads its whole shard: as many slices as there are replicas.
                let read = slices * u64::from(replicas) * 4;
                assert_eq!(found.sent_bytes(), read * (world - 1));
                assert_eq!(found.across_bytes(), read * far);
                continue;
            }
            for each in &found.collectives {
                let slice = slice(numels[each.unit]);
                let (sent, across) = match each.kind {
                    CollectiveKind::AllGather => {
                        (slice * u64::from(replicas) * u64::from(shards - 1) * 2, 0)
                    }
                    CollectiveKind::AllToAll => (slice * (world - 1) * 4, slice * far * 4),
                    CollectiveKind::AllGatherSums => {
                        let sent = slice * u64::from(replicas - 1) * 4;
                        (sent, sent)
                    }
                    CollectiveKind::AllGatherGradients => panic!("not at stage 3"),
                    CollectiveKind::AllGatherAcross | CollectiveKind::AllToAllAcross => {
                        panic!("nothing travels as integers")
                    }
                };
                assert_eq!((each.sent, each.across), (sent, across), "{each:?}");
            }
            let reduced = units_of(
                &found.collectives,
                CollectiveKind::AllToAll,
                Phase::Backward,
            );
            let sums = units_of(
                &found.collectives,
                CollectiveKind::AllGatherSums,
                Phase::Backward,
            );
            assert_eq!(reduced, [2, 1, 0]);
            assert_eq!(sums, reduced);
            // A unit's sums go out when the next unit is reduced.
            let kinds: Vec<_> = found
                .collectives
                .iter()
                .map(|each| (each.kind, each.unit))
                .collect();
            let at = |kind, unit| {
                kinds
                    .iter()
                    .position(|each| *each == (kind, unit))
                    .expect("begun")
            };
            for pair in reduced.windows(2) {
                let (sums, next) = (
                    at(CollectiveKind::AllGatherSums, pair[0]),
                    at(CollectiveKind::AllToAll, pair[1]),
                );
                assert!(at(CollectiveKind::AllToAll, pair[0]) < sums && sums < next);
            }
        }
    }
}

#[test]
fn one_rank_exchanges_nothing() {
    let plan = plan(1, 3, Transport::Collective, &[5000], 1);
    assert_eq!(Schedule::new(&plan), Schedule::default());
}

fn pass(backward: bool, units: &[usize]) -> Pass {
    Pass {
        backward,
        units: units.to_vec(),
    }
}

#[test]
fn a_pass_gathers_its_own_units_and_every_backward_reduces_all() {
    let plan = plan(4, 3, Transport::Collective, &[500, 500, 500, 500], 0);
    let (first, second) = ([1, 2], [3, 4]);
    let passes = [
        pass(false, &first),
        pass(false, &second),
        pass(true, &second),
        pass(true, &first),
    ];
    let found = Schedule::of(&plan, &passes).collectives;
    // Every unit is brought once: between the two passes that use it, it stays.
    let mut gathered = units_of(&found, CollectiveKind::AllGather, Phase::Forward);
    gathered.extend(units_of(&found, CollectiveKind::AllGather, Phase::Backward));
    gathered.sort_unstable();
    gathered.dedup();
    assert_eq!(gathered, [0, 1, 2, 3, 4]);
    let reduced = units_of(&found, CollectiveKind::AllToAll, Phase::Backward);
    assert_eq!(reduced.len(), 2 * 5);
    let forward = units_of(&found, CollectiveKind::AllGather, Phase::Forward);
    assert_eq!(forward, [0, 1, 2, 3, 4]);
    // Only the first stage: nothing of the other is brought.
    let alone = Schedule::of(&plan, &[pass(false, &first), pass(true, &first)]).collectives;
    assert!(
        alone
            .iter()
            .all(|each| each.kind != CollectiveKind::AllGather || each.unit < 3)
    );
}

#[test]
fn micro_batches_add_up() {
    for stage in 0..3 {
        let plan = plan(3, stage, Transport::Collective, &[700, 900], 1);
        let one = Schedule::new(&plan);
        let three = [false, true, false, true, false, true].map(|backward| pass(backward, &[]));
        let found = Schedule::of(&plan, &three);
        let at = |schedule: &Schedule, phase| {
            let rows = schedule.collectives.iter();
            rows.filter(|each| each.phase == phase)
                .map(|each| each.sent)
                .sum::<u64>()
        };
        assert_eq!(at(&found, Phase::Backward), 3 * at(&one, Phase::Backward));
        assert_eq!(at(&found, Phase::Step), at(&one, Phase::Step));
    }
}

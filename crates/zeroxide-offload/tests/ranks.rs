//! The core spread over ranks, against plain loops over all gradients: sums in rank order, one kernel call a parameter.

mod world;

use world::{Case, Outcome, STEPS, live_of, reference};
use zeroxide_layout::Format;
use zeroxide_offload::{GradientHome, StateHome, Transport, WeightHome};
use zeroxide_storage::{EngineKind, SimOptions};

fn case(world: usize) -> Case {
    Case {
        world,
        transport: Transport::Shared,
        shards: world,
        weights: WeightHome::Host,
        state: StateHome::Host,
        gradients: GradientHome::Host,
        format: Format::Split,
        tile_elements: 2048,
        threads: 1,
        engine: EngineKind::Auto,
    }
}

/// Master weights, moments and every rank's live weights bit for bit, norms but for the order of their sums.
fn check(case: &Case) -> Outcome {
    let what = format!(
        "{} ranks, {:?}, shards of {}, weights {:?}, state {:?}, {:?}, tiles of {}, {} threads",
        case.world,
        case.transport,
        case.shards,
        case.weights,
        case.state,
        case.format,
        case.tile_elements,
        case.threads
    );
    let (values, norms) = reference(case.world);
    let outcome: Outcome = case.run();
    for (key, parts) in &values {
        for (part, (expected, found)) in parts.iter().zip(&outcome.values[key]).enumerate() {
            let differing = expected
                .iter()
                .zip(found)
                .filter(|(a, b)| a.to_bits() != b.to_bits())
                .count();
            assert_eq!(differing, 0, "{what}: part {part} of parameter {key:?}");
        }
    }
    let live = live_of(&values);
    for (rank, found) in outcome.live.iter().enumerate() {
        assert!(*found == live, "{what}: live weights of rank {rank}");
    }
    assert_eq!(norms.len() as u64, STEPS);
    for (expected, found) in norms.iter().zip(&outcome.norms) {
        // 36,000 terms, all positive: less than 36,000 roundings of 2^-53.
        assert!(
            (expected - found).abs() <= 1e-11 * expected,
            "{what}: {expected} {found}"
        );
    }
    outcome
}

/// Catches: a sum in another order than that of the ranks, a shard that starts or ends elsewhere, a part that a rank
/// leaves out, old weights under a window, ranks that do not agree on what has to be gathered.
#[test]
fn every_transport_home_and_world_gives_the_bits_of_plain_loops() {
    for world in [1, 2, 3, 4] {
        for transport in [Transport::Shared, Transport::Collective] {
            for shards in [1, world] {
                check(&Case {
                    transport,
                    shards,
                    ..case(world)
                });
            }
        }
    }
    for world in [2, 4] {
        for transport in [Transport::Shared, Transport::Collective] {
            for (weights, state) in [
                (WeightHome::Host, StateHome::Disk),
                (WeightHome::Disk, StateHome::Disk),
                (WeightHome::Disk, StateHome::Host),
                (WeightHome::Shard, StateHome::Host),
                (WeightHome::Shard, StateHome::Disk),
            ] {
                check(&Case {
                    transport,
                    weights,
                    state,
                    ..case(world)
                });
            }
        }
    }
}

/// Ranks in groups give the bits of plain loops, and the norms those of plain sharding, which are sums over the same
/// slices in the same order. Catches: sums of a group that are added to those of another, a norm over shards instead of
/// slices, a replica whose sums do not come, weights of another group's copy.
#[test]
fn groups_of_ranks_give_the_bits_of_plain_sharding() {
    for (world, shards) in [(4, 2), (6, 2), (6, 3)] {
        for (transport, weights, state) in [
            (Transport::Shared, WeightHome::Host, StateHome::Host),
            (Transport::Shared, WeightHome::Host, StateHome::Disk),
            (Transport::Shared, WeightHome::Disk, StateHome::Disk),
            (Transport::Collective, WeightHome::Host, StateHome::Host),
            (Transport::Collective, WeightHome::Shard, StateHome::Host),
            (Transport::Collective, WeightHome::Shard, StateHome::Disk),
            (Transport::Collective, WeightHome::Disk, StateHome::Disk),
        ] {
            let plain = Case {
                transport,
                weights,
                state,
                ..case(world)
            };
            let grouped = Case {
                shards,
                ..plain.clone()
            };
            let outcome = check(&grouped);
            assert!(
                outcome.norms == check(&plain).norms,
                "{world} by {shards}, {transport:?}"
            );
        }
    }
}

/// Catches: offsets of tiles, of a thread's parts or of a format's blocks that forget where the shard starts.
#[test]
fn tiles_threads_and_formats_change_nothing() {
    for (tile_elements, threads) in [(2048, 3), (6144, 1), (1 << 20, 2)] {
        for format in [Format::Split, Format::Fp32] {
            for (transport, weights, state) in [
                (Transport::Shared, WeightHome::Disk, StateHome::Disk),
                (Transport::Collective, WeightHome::Shard, StateHome::Host),
            ] {
                check(&Case {
                    transport,
                    weights,
                    state,
                    format,
                    tile_elements,
                    threads,
                    ..case(3)
                });
            }
        }
    }
}

/// In a format that rounds, everything is the same wherever a shard begins, whoever keeps it and however it travels: with
/// all ranks keeping everything, a part each, or parts within groups. That the bits are those of plain kernel calls,
/// `stream.rs` shows.
///
/// Catches: random bits counted from the start of a shard or of a unit, a block of moments that a shard cuts.
#[test]
fn formats_that_round_do_not_depend_on_who_keeps_what() {
    for format in [Format::SplitBf16, Format::Compact] {
        let whole = Case {
            format,
            shards: 1,
            transport: Transport::Collective,
            ..case(4)
        };
        let expected = whole.run();
        for (transport, shards, weights, state, tile_elements) in [
            (
                Transport::Collective,
                4,
                WeightHome::Shard,
                StateHome::Host,
                1 << 20,
            ),
            (
                Transport::Collective,
                2,
                WeightHome::Shard,
                StateHome::Disk,
                2048,
            ),
            (
                Transport::Collective,
                4,
                WeightHome::Disk,
                StateHome::Disk,
                6144,
            ),
            (
                Transport::Shared,
                4,
                WeightHome::Host,
                StateHome::Disk,
                2048,
            ),
            (
                Transport::Shared,
                2,
                WeightHome::Disk,
                StateHome::Host,
                6144,
            ),
        ] {
            let other = Case {
                transport,
                shards,
                weights,
                state,
                tile_elements,
                threads: 2,
                ..whole.clone()
            };
            let found = other.run();
            let what =
                format!("{format} {transport:?} {shards} {weights:?} {state:?} {tile_elements}");
            assert!(found.values == expected.values, "{what}: values");
            assert!(found.live == expected.live, "{what}: live weights");
        }
    }
}

/// Catches: a step of one rank that another overtakes, completions expected in order, frames that go to another unit
/// because of what the disk has done, so that ranks do not agree on what has to be gathered.
#[test]
fn a_disk_that_is_slow_and_reorders_changes_nothing() {
    for seed in 0..3 {
        let options = SimOptions {
            seed,
            reorder: true,
            short_share: 0.3,
            ..SimOptions::default()
        };
        for (transport, weights) in [
            (Transport::Shared, WeightHome::Host),
            (Transport::Shared, WeightHome::Disk),
            (Transport::Collective, WeightHome::Disk),
            (Transport::Collective, WeightHome::Shard),
        ] {
            check(&Case {
                transport,
                weights,
                state: StateHome::Disk,
                engine: EngineKind::Simulated(options.clone()),
                ..case(2)
            });
        }
    }
}

/// The same job again gives the same bits, whichever rank comes first.
#[test]
fn repetitions_give_the_same_bits() {
    let first = case(4).run();
    for _ in 0..5 {
        let again = case(4).run();
        assert!(again.values == first.values && again.norms == first.norms);
    }
}

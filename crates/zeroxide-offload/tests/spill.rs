//! Gradients that wait on disk for the step, against those that never leave memory: the same bits, and a bounded room.

use std::time::Duration;

mod harness;
#[allow(
    dead_code,
    reason = "of the world this file only runs what ranks.rs looks at in detail"
)]
mod world;

use harness::{
    REFERENCE_STEPS, SCALE, UNITS, backward, gradient, master, reference, run, sim, step,
};
use zeroxide_layout::Format;
use zeroxide_memory::Bucket;
use zeroxide_offload::{GradientHome, Offload, StateHome, Transport, WeightHome};
use zeroxide_optim::Grad;
use zeroxide_storage::{EngineKind, Fault, FaultRule, OpKind, SimOptions, Trigger};

const EIO: i32 = 5;

fn case() -> harness::Case {
    harness::Case {
        gradients: GradientHome::Disk,
        ..harness::Case::default()
    }
}

/// Catches: a tile of gradients read at another's place, one written after it was read, a room that a unit gets with what
/// another has left in it, gradients of the step before.
#[test]
fn gradients_on_disk_give_the_bits_of_one_plain_pass() {
    let expected = reference();
    for weights in [WeightHome::Host, WeightHome::Disk] {
        for format in [Format::Split, Format::Fp32] {
            for threads in [1, 3] {
                for tile_elements in [2048, 6144, 1 << 20] {
                    let case = harness::Case {
                        weights,
                        format,
                        threads,
                        tile_elements,
                        ..case()
                    };
                    let offload = run(&case, REFERENCE_STEPS).expect("no fault was asked for");
                    assert_eq!(
                        master(&offload),
                        expected,
                        "{weights:?} {format:?} {threads} {tile_elements}"
                    );
                }
            }
        }
    }
}

/// Catches: writes and reads of gradients that overtake one another where the disk is slow and out of order.
#[test]
fn a_slow_disk_that_reorders_changes_nothing() {
    let expected = reference();
    for seed in 0..6 {
        let engine = sim(|options| {
            options.seed = seed;
            options.reorder = true;
            options.short_share = 0.3;
        });
        let case = harness::Case {
            engine,
            tile_elements: 4096,
            ..case()
        };
        assert_eq!(
            master(&run(&case, REFERENCE_STEPS).expect("no fault")),
            expected
        );
    }
}

/// Catches: a further micro-batch that starts from zero or from what memory happens to hold, the sums of other ranks lost
/// on the way, and a norm of a part of the sum. The oracle is that of `ranks.rs`: two micro-batches a step.
#[test]
fn micro_batches_add_up_over_any_number_of_ranks() {
    for (world, transport) in [
        (1, Transport::Shared),
        (2, Transport::Shared),
        (3, Transport::Collective),
    ] {
        for weights in [WeightHome::Host, WeightHome::Disk] {
            let case = world::Case {
                world,
                transport,
                shards: world,
                weights,
                state: StateHome::Disk,
                gradients: GradientHome::Disk,
                format: Format::Split,
                tile_elements: 2048,
                threads: 2,
                engine: EngineKind::Simulated(SimOptions {
                    reorder: true,
                    ..SimOptions::default()
                }),
            };
            let (values, norms) = world::reference(world);
            let outcome = case.run();
            for (key, parts) in &values {
                for (expected, found) in parts.iter().zip(&outcome.values[key]) {
                    let same = expected
                        .iter()
                        .zip(found)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(
                        same,
                        "parameter {key:?} of {world} ranks, {transport:?}, {weights:?}"
                    );
                }
            }
            for (expected, found) in norms.iter().zip(&outcome.norms) {
                // As in ranks.rs: less than 36,000 roundings of 2^-53.
                assert!((expected - found).abs() <= 1e-11 * expected);
            }
        }
    }
}

/// Catches: gradients that leave memory before the step at no gain, and ones that stay there for good: the room is that of
/// the two largest units, less than all three have.
#[test]
fn memory_holds_two_units_and_the_disk_the_others() {
    let (spilled, kept) = (case().open(), harness::Case::default().open());
    let bytes = |core: &Offload| core.usage(Bucket::Gradients).peak;
    for core in [&spilled, &kept] {
        backward(core, 0).expect("no fault");
    }
    let padded = |unit: usize| {
        let trained = UNITS[unit]
            .iter()
            .filter(|(_, trained)| *trained)
            .map(|(numel, _)| numel);
        trained.sum::<u64>() * 4
    };
    assert!(bytes(&kept) >= (0..UNITS.len()).map(padded).sum());
    // The largest unit twice, with at most a tile of padding each.
    assert!(
        bytes(&spilled) <= 2 * (padded(2) + 2048 * 4),
        "{}",
        bytes(&spilled)
    );
    assert!(bytes(&spilled) < bytes(&kept) + 2 * padded(2) - padded(0) - padded(1));
}

/// Catches: an edit or a look at a gradient that finds what memory has instead of what the disk has.
#[test]
fn gradients_on_disk_are_read_and_replaced() {
    let offload = case().open();
    backward(&offload, 0).expect("no fault");
    for unit in [2, 0, 1] {
        let (param, numel) = (
            usize::from(unit == 2),
            UNITS[unit][usize::from(unit == 2)].0,
        );
        let mut found = vec![0.0; usize::try_from(numel).expect("small")];
        offload
            .read_grad(unit, param, 0, &mut found)
            .expect("it has one");
        assert_eq!(found, gradient(0, unit, param, numel), "unit {unit}");
    }
    offload
        .write_grad(2, 1, 7, &[5.0, -6.0])
        .expect("it has one");
    backward_of_unit_0(&offload);
    let mut found = vec![0.0; 4];
    offload.read_grad(2, 1, 6, &mut found).expect("it has one");
    let whole = gradient(0, 2, 1, 20_000);
    assert_eq!(found, [whole[6], 5.0, -6.0, whole[9]]);
}

/// Has unit 0 take the room of another.
fn backward_of_unit_0(offload: &Offload) {
    let grad = gradient(0, 0, 0, 5000);
    offload
        .accumulate(0, 0, 0, Grad::F32(&grad), true)
        .expect("room is made");
}

/// Catches: gradients that were forgotten and come back with the next ones, or overtake them on their way to the disk.
#[test]
fn what_is_forgotten_stays_forgotten() {
    for seed in 0..6 {
        let engine = sim(|options| {
            options.seed = seed;
            options.reorder = true;
            options.latency = Duration::ZERO..Duration::from_millis(2);
        });
        let offload = harness::Case {
            engine,
            weights: WeightHome::Host,
            ..case()
        }
        .open();
        for index in 0..REFERENCE_STEPS {
            // The second sends the first on its way, and leaves the other room to what comes next of the first.
            for (unit, param) in [(2, 1), (1, 0)] {
                let grad = gradient(index + 9, unit, param, UNITS[unit][param].0);
                offload
                    .accumulate(unit, param, 0, Grad::F32(&grad), true)
                    .expect("no fault");
            }
            offload.clear_gradients().expect("no fault");
            step(&offload, index).expect("no fault");
        }
        assert_eq!(master(&offload), reference(), "seed {seed}");
    }
}

/// Catches: traffic for gradients that are of no use: of the step before, or of units that are in memory at the step.
#[test]
fn a_step_moves_the_gradients_of_the_units_that_gave_way_once_each_way() {
    let bytes_of_second_step = |gradients| {
        let case = harness::Case {
            gradients,
            engine: sim(|_| ()),
            weights: WeightHome::Host,
            ..case()
        };
        let offload = case.open();
        let counted = || {
            offload.finish().expect("no fault");
            let counters = offload.io().expect("open").expect("it has a disk").counters;
            (counters.read.bytes, counters.write.bytes)
        };
        step(&offload, 0).expect("no fault");
        let before = counted();
        step(&offload, 2).expect("no fault");
        let after = counted();
        (after.0 - before.0, after.1 - before.1)
    };
    let (kept, spilled) = (
        bytes_of_second_step(GradientHome::Host),
        bytes_of_second_step(GradientHome::Disk),
    );
    // fp32, in whole tiles of 2048 elements: unit 2, then unit 1 for unit 0, which stays.
    let tiles = |elements: u64| elements.div_ceil(2048) * 2048 * 4;
    let moved = tiles(20_000) + tiles(9000 + 64 + 64 + 704);
    assert_eq!(spilled, (kept.0 + moved, kept.1 + moved));
}

/// Catches: what another unit has left in the room, where no gradient comes: padding counts for the scales of blocks.
#[test]
fn a_room_is_zero_where_no_gradient_has_come() {
    let offload = case().open();
    for unit in [2, 1, 2, 1, 0] {
        let (param, numel) = (
            usize::from(unit == 2),
            UNITS[unit][usize::from(unit == 2)].0,
        );
        let ones = vec![1.0; usize::try_from(numel).expect("small")];
        offload
            .accumulate(unit, param, 0, Grad::F32(&ones), true)
            .expect("no fault");
        let (address, bytes) = offload.kept_gradients(unit).expect("it is in memory");
        let kept = world::peek(address, bytes);
        let start = usize::try_from(offload.param_offset(unit, param).expect("it is there"))
            .expect("small")
            * 4;
        let end = start + ones.len() * 4;
        let rest = kept[..start].iter().chain(&kept[end..]);
        assert!(rest.copied().all(|byte| byte == 0), "unit {unit}");
    }
}

/// Catches: a gradient that did not reach the disk and is used all the same, or that is missed without a word. The disk
/// fails at every write in turn; whatever call says so, no step is ever made of a part of the gradients.
#[test]
fn a_gradient_that_did_not_reach_the_disk_is_named_and_not_used() {
    let filled = {
        let engine = sim(|_| ());
        let offload = harness::Case { engine, ..case() }.open();
        let report = offload.io().expect("open").expect("it has a disk");
        report.counters.write.operations
    };
    // Units 2 and 1 leave, in 10 and 5 tiles: all these writes are of gradients.
    for nth in 1..=12 {
        let engine = sim(|options| {
            options.faults = vec![FaultRule {
                kind: Some(OpKind::Write),
                when: Trigger::Nth(filled + nth),
                fault: Fault::Errno(EIO),
            }];
        });
        let offload = harness::Case { engine, ..case() }.open();
        let before = master(&offload);
        let error = step(&offload, 0).expect_err("a write of gradients fails");
        assert!(error.to_string().contains("error 5"), "{error}");
        assert_eq!(
            offload.grad_norm().expect("usable").accumulated,
            0,
            "write {nth}"
        );
        offload
            .step(&[], SCALE)
            .expect("there is nothing to update");
        offload.finish().expect("nothing in the way");
        assert_eq!(master(&offload), before, "write {nth}");
    }
}

/// Catches: gradients that come back from disk changed, and are used.
#[test]
fn gradients_that_come_back_changed_are_refused() {
    let expected = reference();
    let mut refused = 0;
    for nth in 0..40 {
        let engine = sim(|options| {
            options.faults = vec![FaultRule {
                kind: Some(OpKind::Read),
                when: Trigger::Nth(nth),
                fault: Fault::FlipBit,
            }];
        });
        let case = harness::Case {
            engine,
            weights: WeightHome::Host,
            ..case()
        };
        match run(&case, REFERENCE_STEPS).and_then(|offload| offload.finish().map(|()| offload)) {
            Ok(offload) => assert_eq!(master(&offload), expected, "read {nth}"),
            Err(error) => {
                refused += usize::from(error.to_string().contains("gradient"));
            }
        }
    }
    assert!(refused > 0, "no read of a gradient was damaged");
}

//! Updates that begin inside of backward, against one plain pass after it: the same bits, in less memory, and nothing
//! half made that is used.

use std::time::Duration;

mod harness;

use harness::{
    Case, REFERENCE_STEPS, SCALE, UNITS, gradient, hyperparameters, is_unused, master, reference,
    sim, try_master,
};
use zeroxide_layout::{Format, ParamShape};
use zeroxide_memory::Bucket;
use zeroxide_offload::{
    GradientHome, Offload, OffloadError, Result, StateHome, UnitSpec, WeightHome,
};
use zeroxide_optim::{AdamParams, Grad, Optimizer};
use zeroxide_storage::{Fault, FaultRule, OpKind, Trigger};

const EIO: i32 = 5;

fn case() -> Case {
    Case {
        gradients: GradientHome::Consumed,
        ..Case::default()
    }
}

/// A step whose units are updated as backward comes by, but for those in `late`.
fn step(offload: &Offload, step: u64, late: &[usize]) -> Result<()> {
    backward(offload, step, late, |gradient| gradient)?;
    offload.step(&[hyperparameters()], SCALE)
}

fn backward(
    offload: &Offload,
    step: u64,
    late: &[usize],
    change: impl Fn(Vec<f32>) -> Vec<f32>,
) -> Result<()> {
    for unit in 0..UNITS.len() {
        offload.gather(unit, false)?;
        offload.prefetch((unit + 1) % UNITS.len())?;
        offload.release(unit)?;
    }
    offload.begin_early(&[hyperparameters()], SCALE)?;
    for unit in (0..UNITS.len()).rev() {
        offload.gather(unit, false)?;
        accumulate(offload, step, unit, &change)?;
        offload.release(unit)?;
        if !late.contains(&unit) {
            offload.update_early(unit)?;
        }
    }
    Ok(())
}

fn accumulate(
    offload: &Offload,
    step: u64,
    unit: usize,
    change: impl Fn(Vec<f32>) -> Vec<f32>,
) -> Result<()> {
    for (param, (numel, trainable)) in UNITS[unit].iter().enumerate() {
        if *trainable && !is_unused(step, unit, param) {
            let values = change(gradient(step, unit, param, *numel));
            offload.accumulate(unit, param, 0, Grad::F32(&values), true)?;
        }
    }
    Ok(())
}

fn run(case: &Case, late: &[usize]) -> Result<Offload> {
    let offload = case.open_filled()?;
    for index in 0..REFERENCE_STEPS {
        step(&offload, index, late)?;
    }
    Ok(offload)
}

/// Catches: an update with the constants of another step, one that is made twice or by the step alone, gradients that
/// another unit has overwritten before, weights that a later read finds as they were.
#[test]
fn updates_inside_of_backward_give_the_bits_of_one_plain_pass() {
    let expected = reference();
    for (weights, state) in [
        (WeightHome::Host, StateHome::Host),
        (WeightHome::Host, StateHome::Disk),
        (WeightHome::Disk, StateHome::Disk),
        (WeightHome::Disk, StateHome::Host),
    ] {
        for gradients in [GradientHome::Consumed, GradientHome::Host] {
            for (format, threads, tile_elements) in [
                (Format::Split, 1, 2048),
                (Format::Fp32, 3, 6144),
                (Format::Split, 2, 1 << 20),
            ] {
                for late in [&[][..], &[2], &[0, 1]] {
                    let case = Case {
                        weights,
                        state,
                        gradients,
                        format,
                        threads,
                        tile_elements,
                        ..Case::default()
                    };
                    let offload = run(&case, late).expect("no fault was asked for");
                    assert_eq!(
                        master(&offload),
                        expected,
                        "{weights:?} {state:?} {gradients:?} {format:?} {tile_elements} {late:?}"
                    );
                }
            }
        }
    }
}

/// Catches: an update that overtakes the reads or the writes of the one before it where the disk is slow and out of order.
#[test]
fn a_slow_disk_that_reorders_changes_nothing() {
    for seed in 0..6 {
        let engine = sim(|options| {
            options.seed = seed;
            options.reorder = true;
            options.short_share = 0.3;
            options.latency = Duration::ZERO..Duration::from_millis(1);
        });
        let case = Case {
            engine,
            tile_elements: 4096,
            ..case()
        };
        let offload = run(&case, &[]).expect("no fault");
        assert_eq!(master(&offload), reference(), "seed {seed}");
    }
}

/// Catches: room for the gradients of the whole model, and blocks or traffic for them on disk.
#[test]
fn gradients_have_room_for_two_units_and_none_on_disk() {
    let traffic = |gradients| {
        let offload = Case {
            gradients,
            engine: sim(|_| ()),
            weights: WeightHome::Host,
            ..Case::default()
        }
        .open();
        for index in 0..2 {
            step(&offload, index * 2, &[]).expect("no fault");
        }
        offload.finish().expect("no fault");
        let counters = offload.io().expect("open").expect("it has a disk").counters;
        let peak = offload.usage(Bucket::Gradients).peak;
        (peak, counters.read.bytes, counters.write.bytes)
    };
    let (consumed, kept) = (traffic(GradientHome::Consumed), traffic(GradientHome::Host));
    // fp32; every parameter starts at a multiple of 64, and unit 2 ends at one of 2048.
    assert_eq!(consumed.0, 2 * 20_480 * 4);
    assert!(kept.0 > consumed.0 - 20_480 * 4 + (5000 + 77 + 9000 + 765) * 4);
    assert_eq!((consumed.1, consumed.2), (kept.1, kept.2));
}

/// Four units of one parameter of 3000 elements.
fn four_alike(gradients: GradientHome) -> Offload {
    let units: Vec<UnitSpec> = (0..4)
        .map(|index| UnitSpec {
            mesh: None,
            name: format!("unit {index}"),
            held_through_backward: false,
            params: vec![ParamShape {
                numel: 3000,
                trainable: true,
            }],
            weights: WeightHome::Host,
            state: StateHome::Host,
            gradients,
            optimizer: hyperparameters(),
            format: Format::Split,
            streams: Vec::new(),
        })
        .collect();
    let offload = Offload::new(&Case::default().settings(), &units).expect("nothing in the way");
    for unit in 0..4 {
        offload.fill_begin(unit, "weight").expect("open");
        let values = gradient(9, unit, 0, 3000);
        offload.fill_param(unit, 0, 0, &values).expect("it fits");
        offload.fill_commit(unit).expect("it was begun");
    }
    offload
}

/// Catches: a unit of which no update is asked and that keeps its room, for which the others would wait without end; and
/// a gradient for it that comes after that and is lost.
#[test]
fn a_unit_whose_turn_is_over_gives_way() {
    let made = [GradientHome::Consumed, GradientHome::Host].map(|gradients| {
        let offload = four_alike(gradients);
        offload
            .begin_early(&[hyperparameters()], SCALE)
            .expect("nothing is under way");
        for unit in [3, 2, 1, 0] {
            let values = gradient(0, unit, 0, 3000);
            offload
                .accumulate(unit, 0, 0, Grad::F32(&values), true)
                .expect("room is made");
        }
        if gradients == GradientHome::Consumed {
            let late = gradient(0, 3, 0, 3000);
            let refused = offload.accumulate(3, 0, 0, Grad::F32(&late), true);
            assert!(matches!(refused, Err(OffloadError::UpdatedEarly { .. })));
        }
        offload
            .step(&[hyperparameters()], SCALE)
            .expect("it ends what began");
        let mut values = vec![0.0; 12_000];
        for (unit, part) in values.chunks_mut(3000).enumerate() {
            offload
                .read_param(unit, 0, "weight", 0, part)
                .expect("open");
        }
        values
    });
    assert_eq!(made[0], made[1]);
}

/// Catches: weights, state or gradients that are given out while they are those of neither step, and a commit of them.
#[test]
fn what_lies_between_two_steps_is_not_shown() {
    let offload = case().open();
    backward(&offload, 0, &[0], |gradient| gradient).expect("no fault");
    let mut values = [0.0; 4];
    let refused = [
        offload.read_param(0, 0, "weight", 0, &mut values),
        offload.write_param(0, 0, "weight", 0, &[1.0]),
        offload.read_grad(0, 0, 0, &mut values),
        offload.write_grad(0, 0, 0, &[1.0]),
        offload.clear_gradients(),
        offload.begin_early(&[hyperparameters()], SCALE),
    ];
    for outcome in refused {
        assert!(matches!(outcome, Err(OffloadError::InsideStep { .. })));
    }
    let used = offload.gather(2, false).map(drop);
    assert!(matches!(used, Err(OffloadError::UpdatedEarly { .. })));
    offload.gather(0, false).expect("its turn is to come");
    offload
        .step(&[hyperparameters()], SCALE)
        .expect("none of it did any harm");
    for index in 1..REFERENCE_STEPS {
        step(&offload, index, &[]).expect("no fault");
    }
    assert_eq!(master(&offload), reference());
}

/// Catches: a step that ends with other constants than those with which it began.
#[test]
fn other_hyperparameters_than_those_of_backward_are_refused() {
    let offload = case().open();
    backward(&offload, 0, &[], |gradient| gradient).expect("no fault");
    let other = Optimizer::from(AdamParams {
        lr: 2e-2,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        bias_correction: true,
    });
    for (groups, scale) in [(other, SCALE), (hyperparameters(), SCALE / 2.0)] {
        let refused = offload.step(&[groups], scale);
        assert!(matches!(refused, Err(OffloadError::OtherConstants)));
    }
    offload
        .step(&[hyperparameters()], SCALE)
        .expect("the same again");
    for index in 1..REFERENCE_STEPS {
        step(&offload, index, &[]).expect("no fault");
    }
    assert_eq!(master(&offload), reference());
}

/// Catches: an update with a gradient that is not finite; and a state of two steps that is used after one, where the
/// first unit's were finite.
#[test]
fn a_gradient_that_is_not_finite_updates_nothing() {
    let infinite = |mut gradient: Vec<f32>| {
        gradient[0] = f32::INFINITY;
        gradient
    };
    let offload = case().open();
    let before = master(&offload);
    let error = backward(&offload, 0, &[], infinite).expect_err("the first unit's is infinite");
    assert!(matches!(error, OffloadError::NotFinite { updated: 0, .. }));
    assert!(!offload.fail_early("it did").expect("open"));
    offload.clear_gradients().expect("open");
    assert_eq!(master(&offload), before);
    // Unit 1 alone has a parameter of one element.
    let late = |gradient: Vec<f32>| {
        if gradient.len() == 1 {
            infinite(gradient)
        } else {
            gradient
        }
    };
    let error = backward(&offload, 0, &[], late).expect_err("the second unit's is infinite");
    assert!(matches!(error, OffloadError::NotFinite { updated: 1, .. }));
    let error = try_master(&offload).expect_err("the state is mixed");
    assert!(matches!(error, OffloadError::Poisoned { .. }), "{error}");
}

/// Catches: a backward that failed between two updates and after which training goes on.
#[test]
fn a_backward_that_fails_after_an_update_leaves_a_mixed_state_that_says_so() {
    let offload = case().open();
    backward(&offload, 0, &[0, 1], |gradient| gradient).expect("no fault");
    assert!(offload.fail_early("a hook raised").expect("open"));
    let error = try_master(&offload).expect_err("the state is mixed");
    assert!(error.to_string().contains("a hook raised"), "{error}");
    let error = offload
        .step(&[hyperparameters()], SCALE)
        .expect_err("the state is mixed");
    assert!(matches!(error, OffloadError::Poisoned { .. }), "{error}");
}

/// Catches: a failure of the disk inside of backward that nobody hears of.
#[test]
fn a_disk_that_fails_under_backward_is_named() {
    let filled = {
        let offload = Case {
            engine: sim(|_| ()),
            ..case()
        }
        .open();
        let report = offload.io().expect("open").expect("it has a disk");
        report.counters.write.operations
    };
    for nth in [1, 7, 20] {
        let engine = sim(|options| {
            options.faults = vec![FaultRule {
                kind: Some(OpKind::Write),
                when: Trigger::Nth(filled + nth),
                fault: Fault::Errno(EIO),
            }];
        });
        let offload = Case { engine, ..case() }.open();
        let error = step(&offload, 0, &[])
            .and_then(|()| offload.finish())
            .expect_err("a write of an update fails");
        assert!(error.to_string().contains("error 5"), "{error}");
        assert!(try_master(&offload).is_err(), "write {nth}");
    }
}

//! Updates inside of backward that are taken back, against one plain pass after it: the bits of a step that waited.

use std::time::Duration;

mod harness;

use harness::{
    Case, REFERENCE_STEPS, SCALE, UNITS, gradient, hyperparameters, is_unused, master, reference,
    sim,
};
use zeroxide_layout::Format;
use zeroxide_offload::{GradientHome, Offload, Result, StateHome, WeightHome};
use zeroxide_optim::Grad;
use zeroxide_storage::{Fault, FaultRule, OpKind, Trigger};

const EIO: i32 = 5;

fn case() -> Case {
    Case {
        speculates: true,
        ..Case::default()
    }
}

/// Backward with updates whose gradients are multiplied with `scale`.
fn backward(offload: &Offload, step: u64, scale: f64) -> Result<()> {
    for unit in 0..UNITS.len() {
        offload.gather(unit, false)?;
        offload.prefetch((unit + 1) % UNITS.len())?;
        offload.release(unit)?;
    }
    offload.begin_speculation(&[hyperparameters()], scale)?;
    for unit in (0..UNITS.len()).rev() {
        offload.gather(unit, false)?;
        for (param, (numel, trainable)) in UNITS[unit].iter().enumerate() {
            if *trainable && !is_unused(step, unit, param) {
                let values = gradient(step, unit, param, *numel);
                offload.accumulate(unit, param, 0, Grad::F32(&values), true)?;
            }
        }
        offload.release(unit)?;
        offload.update_early(unit)?;
    }
    Ok(())
}

/// A step that is made again where `clips`: what backward has made of it is of twice the gradients.
fn step(offload: &Offload, step: u64, clips: bool) -> Result<()> {
    let scale = if clips { 2.0 * SCALE } else { SCALE };
    backward(offload, step, scale)?;
    if clips {
        assert!(offload.take_back()?, "backward has updated");
    }
    offload.step(&[hyperparameters()], SCALE)
}

fn run(case: &Case, clips: impl Fn(u64) -> bool) -> Result<Offload> {
    let offload = case.open_filled()?;
    for index in 0..REFERENCE_STEPS {
        step(&offload, index, clips(index))?;
    }
    Ok(offload)
}

/// Catches: a tile of the step that was taken back, moments of it where there had been none, a number of updates counted
/// twice, gradients that are gone when they are wanted again, and weights under a window that are those of neither.
#[test]
fn what_is_taken_back_leaves_nothing() {
    let expected = reference();
    for gradients in [GradientHome::Host, GradientHome::Disk] {
        for (format, threads, tile_elements) in [
            (Format::Split, 1, 2048),
            (Format::Fp32, 3, 6144),
            (Format::Split, 2, 1 << 20),
        ] {
            for mask in [0b0000, 0b0101, 0b1010, 0b1111] {
                let case = Case {
                    gradients,
                    format,
                    threads,
                    tile_elements,
                    staging_bytes: 8 << 20,
                    ..case()
                };
                let offload = run(&case, |index| mask >> index & 1 == 1).expect("no fault");
                assert_eq!(
                    master(&offload),
                    expected,
                    "{gradients:?} {format:?} {tile_elements} {mask:b}"
                );
            }
        }
    }
}

/// Catches: a read or write of the step that was taken back and that ends within the one that follows.
#[test]
fn a_slow_disk_that_reorders_changes_nothing() {
    for seed in 0..4 {
        let engine = sim(|options| {
            options.seed = seed;
            options.reorder = true;
            options.short_share = 0.3;
            options.latency = Duration::ZERO..Duration::from_millis(1);
        });
        let case = Case {
            engine,
            gradients: GradientHome::Disk,
            tile_elements: 4096,
            ..case()
        };
        let offload = run(&case, |index| index % 2 == 0).expect("no fault");
        assert_eq!(master(&offload), reference(), "seed {seed}");
    }
}

/// Catches: an update of a unit that has no second place, and one that nobody can take back.
#[test]
fn units_without_a_second_place_wait_for_the_step() {
    for (weights, state) in [
        (WeightHome::Host, StateHome::Disk),
        (WeightHome::Disk, StateHome::Host),
    ] {
        let case = Case {
            weights,
            state,
            ..case()
        };
        let offload = case.open();
        backward(&offload, 0, 2.0 * SCALE).expect("no fault");
        assert!(!offload.take_back().expect("open"));
        offload.step(&[hyperparameters()], SCALE).expect("no fault");
    }
    for (gradients, speculates) in [(GradientHome::Consumed, true), (GradientHome::Host, false)] {
        let case = Case {
            gradients,
            speculates,
            ..case()
        };
        let refused = case
            .open()
            .begin_speculation(&[hyperparameters()], SCALE)
            .expect_err("nothing could be taken back");
        assert!(!refused.to_string().is_empty());
    }
}

/// Catches: a backward that fails and leaves a state of neither step.
#[test]
fn a_backward_that_fails_is_taken_back() {
    let offload = case().open_filled().expect("no fault");
    let before = master(&offload);
    backward(&offload, 0, SCALE).expect("no fault");
    assert!(!offload.fail_early("a hook raised").expect("open"));
    offload.clear_gradients().expect("open");
    assert_eq!(master(&offload), before);
    for index in 0..REFERENCE_STEPS {
        step(&offload, index, false).expect("no fault");
    }
    assert_eq!(master(&offload), reference());
}

/// Catches: a failed write inside of backward that nobody hears of, or after which training goes on from half a step.
#[test]
fn a_disk_that_fails_under_backward_is_named_or_harmless() {
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
        for clips in [false, true] {
            let engine = sim(|options| {
                options.faults = vec![FaultRule {
                    kind: Some(OpKind::Write),
                    when: Trigger::Nth(filled + nth),
                    fault: Fault::Errno(EIO),
                }];
            });
            let offload = Case { engine, ..case() }.open();
            if let Err(error) = step(&offload, 0, clips).and_then(|()| offload.finish()) {
                assert!(error.to_string().contains("error 5"), "{error}");
                continue;
            }
            // What failed was taken back with all else.
            assert!(clips, "write {nth}");
            for index in 1..REFERENCE_STEPS {
                step(&offload, index, clips).expect("the fault is over");
            }
            assert_eq!(master(&offload), reference(), "write {nth}");
        }
    }
}

/// Writes of gradients are among those that fail here, whose units are updated already. Catches: a failure that nobody
/// hears of, a state of neither step that is gone on with, gradients that are taken for complete.
#[test]
fn gradients_that_cannot_be_kept_are_named_and_what_was_updated_is_taken_back() {
    let on_disk = |engine| Case {
        engine,
        gradients: GradientHome::Disk,
        ..case()
    };
    let filled = {
        let offload = on_disk(sim(|_| ())).open_filled().expect("no fault");
        let report = offload.io().expect("open").expect("it has a disk");
        report.counters.write.operations
    };
    let (mut taken_back, mut refused) = (0, 0);
    for nth in 1..=60 {
        for clips in [false, true] {
            let engine = sim(|options| {
                options.faults = vec![FaultRule {
                    kind: Some(OpKind::Write),
                    when: Trigger::Nth(filled + nth),
                    fault: Fault::Errno(EIO),
                }];
            });
            let offload = on_disk(engine).open_filled().expect("no fault yet");
            let before = master(&offload);
            let Err(error) = step(&offload, 0, clips).and_then(|()| offload.finish()) else {
                for index in 1..REFERENCE_STEPS {
                    step(&offload, index, clips).expect("the fault is over");
                }
                assert_eq!(master(&offload), reference(), "write {nth}");
                continue;
            };
            assert!(error.to_string().contains("error 5"), "{error}");
            let mixed = offload.fail_early("a write failed").expect("open");
            if mixed || offload.clear_gradients().is_err() {
                offload.check_usable().expect_err("it is of neither step");
                refused += 1;
                continue;
            }
            assert_eq!(master(&offload), before, "write {nth}");
            taken_back += 1;
        }
    }
    assert!(taken_back > 0 && refused > 0, "{taken_back} {refused}");
}

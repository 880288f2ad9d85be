//! Units with different optimizer rules in different formats, in one core.

#![allow(clippy::float_cmp, reason = "the values are exact")]

mod harness;

use harness::{Case, REFERENCE_STEPS, SCALE, UNITS, backward, initial, plain};
use zeroxide_layout::Format;
use zeroxide_offload::{Offload, OffloadError, StateHome, WeightHome};
use zeroxide_optim::{AdagradParams, AdamParams, LionParams, Optimizer, SgdParams};

fn rules() -> [(Optimizer, Format); 3] {
    let sgd = SgdParams {
        lr: 0.1,
        momentum: 0.9,
        dampening: 0.2,
        ..SgdParams::default()
    };
    let adagrad = AdagradParams {
        initial_accumulator_value: 0.25,
        weight_decay: 0.01,
        ..AdagradParams::default()
    };
    [
        (sgd.into(), Format::Split),
        (LionParams::default().into(), Format::Fp32),
        (adagrad.into(), Format::Split),
    ]
}

/// A core in which the parameters of unit i are in group i.
fn open(case: &Case) -> Offload {
    let offload = case.open();
    for (unit, params) in UNITS.iter().enumerate() {
        for param in 0..params.len() {
            offload.set_group(unit, param, unit).expect("a parameter");
        }
    }
    offload
}

fn groups() -> Vec<Optimizer> {
    rules().map(|(optimizer, _)| optimizer).to_vec()
}

fn trainable() -> impl Iterator<Item = (usize, usize, u64)> {
    UNITS.iter().enumerate().flat_map(|(unit, params)| {
        let params = params
            .iter()
            .enumerate()
            .filter(|(_, (_, trainable))| *trainable);
        params.map(move |(param, (numel, _))| (unit, param, *numel))
    })
}

fn read(offload: &Offload, unit: usize, param: usize, name: &str, numel: u64) -> Vec<f32> {
    let mut values = vec![0.0; usize::try_from(numel).expect("small")];
    offload
        .read_param(unit, param, name, 0, &mut values)
        .expect("this unit has it");
    values
}

fn names(optimizer: &Optimizer) -> Vec<&'static str> {
    let moments = optimizer.moments();
    std::iter::once("weight")
        .chain(moments.iter().map(|moment| moment.key.name()))
        .collect()
}

/// Catches: one unit's layout used for another's blocks, tiles or kernel; tensors that come from disk in another order
/// than the kernel takes them; a moment that starts from zero instead of its initial value.
#[test]
fn units_of_different_rules_and_formats_give_the_bits_of_plain_passes() {
    for weights in [WeightHome::Host, WeightHome::Disk, WeightHome::Shard] {
        for state in [StateHome::Host, StateHome::Disk] {
            let case = Case {
                weights,
                state,
                rules: Some(rules()),
                ..Case::default()
            };
            let offload = open(&case);
            for step in 0..REFERENCE_STEPS {
                backward(&offload, step).expect("no fault was asked for");
                offload
                    .step(&groups(), SCALE)
                    .expect("no fault was asked for");
            }
            for (unit, param, numel) in trainable() {
                let optimizer = rules()[unit].0;
                let expected = plain(&optimizer, unit, param, numel);
                for (name, expected) in names(&optimizer).into_iter().zip(expected) {
                    let got = read(&offload, unit, param, name, numel);
                    assert!(
                        got == expected,
                        "{weights:?} {state:?} unit {unit} {param} {name}"
                    );
                }
            }
        }
    }
}

/// Catches: a fill or an edit of one moment that leaves the others of the unit undefined, or zero instead of initial.
#[test]
fn a_moment_that_was_not_written_keeps_its_initial_value() {
    for state in [StateHome::Host, StateHome::Disk] {
        let case = Case {
            state,
            rules: Some(rules()),
            ..Case::default()
        };
        let offload = open(&case);
        let (unit, param, numel) = (2, 1, 20_000);
        assert!(
            read(&offload, unit, param, "sum", numel)
                .iter()
                .all(|value| *value == 0.25)
        );
        offload
            .write_param(unit, param, "sum", 100, &[2.0, 3.0])
            .expect("inside");
        let sum = read(&offload, unit, param, "sum", numel);
        assert_eq!(sum[98..104], [0.25, 0.25, 2.0, 3.0, 0.25, 0.25]);
        assert!(sum[104..].iter().all(|value| *value == 0.25), "{state:?}");
        let weight = read(&offload, unit, param, "weight", numel);
        assert!(weight == initial(unit, param, numel), "{state:?}");
        offload.fill_begin(0, "momentum_buffer").expect("idle");
        offload.fill_param(0, 1, 0, &[7.0; 77]).expect("inside");
        offload.fill_commit(0).expect("filled");
        assert_eq!(read(&offload, 0, 1, "momentum_buffer", 77), [7.0; 77]);
        assert!(
            read(&offload, 0, 0, "momentum_buffer", 5000)
                .iter()
                .all(|value| *value == 0.0)
        );
    }
}

#[test]
fn state_that_a_rule_does_not_have_is_refused_by_name() {
    let case = Case {
        rules: Some(rules()),
        ..Case::default()
    };
    let offload = open(&case);
    let refused = |name: &str| {
        let error = offload
            .read_param(1, 0, name, 0, &mut [0.0])
            .expect_err("Lion has none of these");
        error.to_string()
    };
    assert_eq!(
        refused("exp_avg_sq"),
        "read_param: unit unit 1 has no state \"exp_avg_sq\": its optimizer is lion, which has weight, exp_avg"
    );
    // The halves of a weight are the format's business.
    assert!(refused("master").contains("has no state \"master\""));
    assert!(offload.fill_begin(1, "sum").is_err());
    assert!(offload.write_param(1, 0, "sum", 0, &[0.0]).is_err());
}

#[test]
fn a_group_keeps_its_rule() {
    let case = Case {
        rules: Some(rules()),
        ..Case::default()
    };
    let offload = open(&case);
    backward(&offload, 0).expect("no fault was asked for");
    let mut changed = groups();
    changed[1] = AdamParams::default().into();
    let error = offload
        .step(&changed, SCALE)
        .expect_err("unit 1 has Lion's state");
    assert!(matches!(error, OffloadError::Misuse { .. }));
    assert_eq!(
        error.to_string(),
        "step: group 1 is now adam, and the state of unit 1 is that of lion: a group keeps its optimizer"
    );
    // Nothing has changed: the step can still be made.
    offload
        .step(&groups(), SCALE)
        .expect("no fault was asked for");
}

//! Adagrad against its formula in double precision.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]

mod one_moment;
mod random;

use one_moment::{UNIT, run, within};
use random::Random;
use zeroxide_optim::{AdagradParams, Optimizer};

/// `torch.optim.Adagrad` in double precision: weight, sum, update, and the size of the terms of the gradient over it.
fn oracle(
    params: &AdagradParams,
    step: f64,
    scale: f64,
    [weight, sum, gradient]: [f64; 3],
) -> ([f64; 2], f64, f64) {
    let terms = (scale * gradient).abs() + (params.weight_decay * weight).abs();
    let gradient = scale * gradient + params.weight_decay * weight;
    let sum = sum + gradient * gradient;
    let rate = params.lr / (1.0 + (step - 1.0) * params.lr_decay);
    let update = rate * gradient / (sum.sqrt() + params.eps);
    ([weight - update, sum], update, terms / gradient.abs())
}

/// In units of one rounding: the gradient has two constants, a product and a sum, 4 of its terms; its square adds twice
/// that to the sum, which rounds once; the root halves both and rounds; eps adds its constant and a sum, the quotient
/// rounds, the step size is a constant: (4 + 4) cancel + 0.5 + 5 in all. The new weight rounds once more.
#[test]
fn adagrad_is_its_formula_in_double_precision() {
    let mut random = Random::new(2);
    let mut compared = 0;
    for (lr, lr_decay, weight_decay) in [(1e-2, 0.0, 0.0), (1e-2, 0.1, 0.0), (0.5, 1e-3, 0.1)] {
        for (eps, start) in [(1e-10, 0.0), (1e-3, 0.1), (0.0, 1.0)] {
            let params = AdagradParams {
                lr,
                lr_decay,
                weight_decay,
                initial_accumulator_value: start,
                eps,
            };
            for (step, scale) in [(1, 1.0), (7, 1.0 / 3.0), (1000, 1.0)] {
                let starts: Vec<[f32; 3]> = (0..5000)
                    .map(|index| {
                        let size = [1e-6, 1e-3, 1.0][index % 3];
                        let sum = if step == 1 {
                            start
                        } else {
                            start + (size * random.normal()).powi(2)
                        };
                        [
                            (0.02 * random.normal()) as f32,
                            sum as f32,
                            (size * random.normal()) as f32,
                        ]
                    })
                    .collect();
                let got = run(&Optimizer::from(params), step, scale, &starts);
                for (start, got) in starts.iter().zip(&got) {
                    let number = f64::from(u32::try_from(step).expect("a small step"));
                    let (expected, update, cancel) =
                        oracle(&params, number, scale, start.map(f64::from));
                    within(
                        got[1],
                        expected[1],
                        (8.0 * cancel + 1.0) * UNIT * expected[1],
                    );
                    let units = 8.0 * cancel + 5.5;
                    within(
                        got[0],
                        expected[0],
                        UNIT * (expected[0].abs() + units * update.abs()),
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared >= 100_000, "only {compared}");
}

#[test]
fn the_sum_starts_from_the_initial_value() {
    let params = AdagradParams {
        initial_accumulator_value: 0.25,
        ..AdagradParams::default()
    };
    let moments = Optimizer::from(params).moments();
    assert_eq!(
        (moments.len(), moments[0].initial.to_bits()),
        (1, 0.25_f32.to_bits())
    );
}

#[test]
fn hyperparameters_outside_their_range_are_named() {
    let wrong = AdagradParams {
        initial_accumulator_value: -1.0,
        ..AdagradParams::default()
    };
    let error = Optimizer::from(wrong)
        .validate()
        .expect_err("a negative sum");
    assert_eq!(
        error.to_string(),
        "initial_accumulator_value is -1.0, expected a finite number that is not negative"
    );
}

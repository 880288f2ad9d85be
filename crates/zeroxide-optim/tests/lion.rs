//! Lion against its algorithm in double precision.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]

mod one_moment;
mod random;

use one_moment::{UNIT, run, within};
use random::Random;
use zeroxide_optim::{LionParams, Optimizer};

/// Chen et al. 2023, algorithm 2, and the size of the terms that the direction is the sum of.
fn oracle(
    params: &LionParams,
    scale: f64,
    [weight, mean, gradient]: [f64; 3],
) -> ([f64; 2], f64, f64) {
    let gradient = scale * gradient;
    let direction = params.beta1 * mean + (1.0 - params.beta1) * gradient;
    let sign = if direction == 0.0 {
        0.0
    } else {
        direction.signum()
    };
    let weight = weight - params.lr * (sign + params.weight_decay * weight);
    let terms = (params.beta1 * mean).abs() + ((1.0 - params.beta1) * gradient).abs();
    (
        [
            weight,
            params.beta2 * mean + (1.0 - params.beta2) * gradient,
        ],
        direction,
        terms,
    )
}

/// A constant, a product and a sum round once each: the moment is off by 3 units of its larger term at most, and the
/// direction has its sign where it is more than 4 units of its terms. The weight's change has two constants, a product
/// and a sum, 4 units of the change, and the new weight rounds once more.
#[test]
fn lion_is_algorithm_2_in_double_precision() {
    let mut random = Random::new(1);
    let (mut undecided, mut elements) = (0, 0);
    for (beta1, beta2) in [(0.9, 0.99), (0.95, 0.98), (0.0, 0.0)] {
        for (lr, weight_decay) in [(1e-4, 0.0), (1e-3, 0.1), (0.1, 1.0)] {
            let params = LionParams {
                lr,
                beta1,
                beta2,
                weight_decay,
            };
            for scale in [1.0, 1.0 / 3.0] {
                let starts: Vec<[f32; 3]> = (0..5000)
                    .map(|index| {
                        let mean = (1e-3 * random.normal()) as f32;
                        let mut gradient = (1e-3 * random.normal()) as f32;
                        if index % 4 == 0 {
                            // The terms of the direction cancel to a thousandth.
                            gradient = (-beta1 / (1.0 - beta1) / scale
                                * f64::from(mean)
                                * (1.0 + 1e-3 * random.normal()))
                                as f32;
                        }
                        [(0.02 * random.normal()) as f32, mean, gradient]
                    })
                    .collect();
                let got = run(&Optimizer::from(params), 3, scale, &starts);
                for (start, got) in starts.iter().zip(&got) {
                    elements += 1;
                    let (expected, direction, terms) = oracle(&params, scale, start.map(f64::from));
                    within(
                        got[1],
                        expected[1],
                        3.0 * UNIT * terms.max(f64::from(start[1]).abs()),
                    );
                    if direction.abs() < 4.0 * UNIT * terms {
                        undecided += 1;
                        continue;
                    }
                    let change = lr + lr * weight_decay * f64::from(start[0]).abs();
                    within(
                        got[0],
                        expected[0],
                        UNIT * (expected[0].abs() + 4.0 * change),
                    );
                }
            }
        }
    }
    assert!(
        undecided * 100 < elements,
        "{undecided} of {elements} have no sure sign"
    );
}

#[test]
fn a_zero_direction_leaves_the_weight_to_its_decay() {
    let params = LionParams {
        lr: 0.5,
        weight_decay: 0.5,
        ..LionParams::default()
    };
    let got = run(
        &Optimizer::from(params),
        1,
        1.0,
        &[[2.0, 0.0, 0.0], [2.0, -0.0, -0.0]],
    );
    assert_eq!(got, [[1.5, 0.0], [1.5, 0.0]]);
}

#[test]
fn hyperparameters_outside_their_range_are_named() {
    let wrong = LionParams {
        beta2: 1.0,
        ..LionParams::default()
    };
    let error = Optimizer::from(wrong).validate().expect_err("beta2 = 1");
    assert_eq!(
        error.to_string(),
        "beta2 is 1.0, expected a number in [0, 1)"
    );
}

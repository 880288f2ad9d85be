//! SGD with momentum against its formula in double precision.

#![allow(
    clippy::cast_possible_truncation,
    reason = "test data is rounded on purpose"
)]

mod one_moment;
mod random;

use one_moment::{UNIT, run, within};
use random::Random;
use zeroxide_optim::{Optimizer, SgdParams};

/// `torch.optim.SGD` in double precision, and the sizes of the terms of buffer and update.
fn oracle(
    params: &SgdParams,
    step: u64,
    scale: f64,
    [weight, buffer, gradient]: [f64; 3],
) -> ([f64; 2], f64, f64) {
    let mut size = (scale * gradient).abs() + (params.weight_decay * weight).abs();
    let gradient = scale * gradient + params.weight_decay * weight;
    let fresh = size;
    let mut next = gradient;
    if params.momentum != 0.0 {
        let new = if step == 1 {
            1.0
        } else {
            1.0 - params.dampening
        };
        next = params.momentum * buffer + new * gradient;
        size = (params.momentum * buffer).abs() + new.abs() * size;
    }
    let buffer = next;
    let buffer_terms = size;
    if params.nesterov {
        next = gradient + params.momentum * buffer;
        size = fresh + params.momentum * size;
    }
    (
        [weight - params.lr * next, buffer],
        buffer_terms,
        params.lr * size,
    )
}

/// In units of one rounding, of the terms: the gradient has two constants, a product and a sum (4); the buffer two more
/// constants, a product and a sum (8); the update the same again (12). The new weight rounds once more.
#[test]
fn sgd_is_its_formula_in_double_precision() {
    let mut random = Random::new(3);
    let mut compared = 0;
    for (momentum, dampening, nesterov) in [
        (0.0, 0.0, false),
        (0.0, 0.5, false),
        (0.9, 0.0, false),
        (0.9, 0.3, false),
        (0.9, 0.0, true),
    ] {
        for (lr, weight_decay) in [(0.1, 0.0), (1e-3, 5e-4), (0.5, 0.1)] {
            let params = SgdParams {
                lr,
                momentum,
                dampening,
                weight_decay,
                nesterov,
            };
            for (step, scale) in [(1, 1.0), (2, 1.0 / 3.0), (9, 1.0)] {
                let starts: Vec<[f32; 3]> = (0..5000)
                    .map(|index| {
                        let size = [1e-6, 1e-3, 1.0][index % 3];
                        let buffer = if step == 1 {
                            0.0
                        } else {
                            size * random.normal()
                        };
                        [
                            (0.02 * random.normal()) as f32,
                            buffer as f32,
                            (size * random.normal()) as f32,
                        ]
                    })
                    .collect();
                let got = run(&Optimizer::from(params), step, scale, &starts);
                for (start, got) in starts.iter().zip(&got) {
                    let (expected, buffer, update) =
                        oracle(&params, step, scale, start.map(f64::from));
                    within(got[1], expected[1], 8.0 * UNIT * buffer);
                    within(
                        got[0],
                        expected[0],
                        UNIT * (expected[0].abs() + 12.0 * update),
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared >= 100_000, "only {compared}");
}

#[test]
fn hyperparameters_outside_their_range_are_named() {
    let message = |params: SgdParams| {
        let error = Optimizer::from(params).validate().expect_err("outside");
        error.to_string()
    };
    let look_ahead = SgdParams {
        nesterov: true,
        ..SgdParams::default()
    };
    assert_eq!(
        message(look_ahead),
        "momentum is 0.0, expected a number above 0 with nesterov"
    );
    let damped = SgdParams {
        momentum: 0.9,
        dampening: 0.1,
        ..look_ahead
    };
    assert_eq!(
        message(damped),
        "dampening is 0.1, expected 0 with nesterov"
    );
    let backwards = SgdParams {
        momentum: -0.1,
        ..SgdParams::default()
    };
    assert_eq!(
        message(backwards),
        "momentum is -0.1, expected a finite number that is not negative"
    );
}

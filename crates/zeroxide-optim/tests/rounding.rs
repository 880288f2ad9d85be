//! The formats that round: the same bits however the work is cut, a mean that is the value, what comes back of what was
//! stored, and values at the edges.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "test data is rounded on purpose"
)]

mod one_parameter;
mod random;

use one_parameter::{Tile, numbers};
use zeroxide_layout::{Dtype, Format, STATE_BLOCK, StateLayout, StateTensor};
use zeroxide_optim::{
    AdagradParams, AdamParams, Draw, Grad, Isa, LionParams, Optimizer, SgdParams, bf16_to_f32,
    decode_moment, encode_moment, isa,
};

const FORMATS: [Format; 2] = [Format::SplitBf16, Format::Compact];
/// Neither a multiple of a block nor of a row of lanes.
const LEN: usize = 1999;

fn optimizers() -> [Optimizer; 5] {
    let coupled = AdamParams {
        decoupled: false,
        ..AdamParams::default()
    };
    let momentum = SgdParams {
        momentum: 0.9,
        nesterov: true,
        ..SgdParams::default()
    };
    [
        AdamParams::default().into(),
        coupled.into(),
        LionParams::default().into(),
        AdagradParams::default().into(),
        momentum.into(),
    ]
}

/// Catches: random bits that depend on where a slice begins, a tail that is rounded by other bits than a whole block, a
/// result that depends on the instruction set, the same bits for every update.
#[test]
fn the_bits_depend_on_nothing_but_the_element_and_the_update() {
    let weights = numbers(1, LEN, 0.02);
    for format in FORMATS {
        for optimizer in optimizers() {
            let run = |isa: Isa, cuts: &[usize], stream: u64, ahead: u64| {
                let mut tile = Tile::new(&optimizer, format, &weights);
                for updates in 0..4 {
                    let draw = Draw {
                        stream,
                        updates: updates + ahead,
                        first: 64 * 7,
                    };
                    tile.step(
                        isa,
                        &optimizer,
                        draw,
                        &numbers(10 + updates, LEN, 1e-3),
                        cuts,
                    );
                }
                tile
            };
            let expected = run(isa(), &[0, LEN], 3, 0);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                assert_eq!(
                    run(isa, &[0, LEN], 3, 0),
                    expected,
                    "{optimizer:?} {format} {isa:?}"
                );
                let cuts = [0, 64, 128, 1024, 1088, LEN];
                assert_eq!(
                    run(isa, &cuts, 3, 0),
                    expected,
                    "{optimizer:?} {format} {isa:?} cut"
                );
            }
            assert_ne!(
                run(isa(), &[0, LEN], 4, 0),
                expected,
                "another parameter's bits"
            );
            let later = run(isa(), &[0, LEN], 3, 1 << 40);
            assert_ne!(later, expected, "another update's bits");
        }
    }
}

/// One update of many elements with the same values: each result is one of two neighbours, and their mean is the exact
/// result. With two neighbours a distance `d` apart the mean of `n` has a standard deviation of at most `d / (2 sqrt n)`;
/// five of them are passed by chance once in 1.7 million. What the random bits themselves are rounded to adds 2^-23 `d`.
///
/// Catches: rounding to the nearest, noise of the wrong width, noise that is never or always below a threshold, codes whose
/// distances are taken from another unit.
#[test]
fn the_mean_of_a_rounded_result_is_the_exact_one() {
    const COUNT: usize = 64 * 4000;
    for format in FORMATS {
        for (share, name) in [(1.0, "as it is"), (0.31, "small"), (0.004, "very small")] {
            let optimizer: Optimizer = AdamParams::default().into();
            // The first element of each block is the largest: it makes the unit, and is left out below.
            let at = |index: usize| if index.is_multiple_of(64) { 1.0 } else { share };
            let weights: Vec<f32> = (0..COUNT).map(|_| 0.512_345_7).collect();
            let grad: Vec<f32> = (0..COUNT)
                .map(|index| (0.012_3 * at(index)) as f32)
                .collect();
            let mut rounded = Tile::new(&optimizer, format, &weights);
            let start = f64::from(rounded.weights()[1]);
            rounded.step(
                isa(),
                &optimizer,
                Draw {
                    stream: 9,
                    ..Draw::default()
                },
                &grad,
                &[0, COUNT],
            );
            let gradient = f64::from(grad[1]) * 0.7;
            let (mean, square) = (0.1 * gradient, 0.001 * gradient * gradient);
            let change = 1e-3 * (gradient / (gradient.abs() + 1e-8)) + 1e-3 * 1e-2 * start;
            let found = rounded.moments();
            check_mean(&found[0], mean, &format!("{format} first moment, {name}"));
            check_mean(
                &found[1],
                square,
                &format!("{format} second moment, {name}"),
            );
            if format == Format::Compact {
                check_mean(
                    &rounded.weights(),
                    start - change,
                    &format!("{format} weight, {name}"),
                );
            }
        }
    }
}

fn check_mean(values: &[f32], exact: f64, what: &str) {
    let values = values
        .iter()
        .enumerate()
        .filter(|(index, _)| !index.is_multiple_of(64));
    let values: Vec<f64> = values.map(|(_, value)| f64::from(*value)).collect();
    let (least, most) = values
        .iter()
        .fold((f64::MAX, f64::MIN), |(least, most), value| {
            (least.min(*value), most.max(*value))
        });
    // The fp32 arithmetic before the rounding is within an ulp.
    let slack = exact.abs() * 2.0_f64.powi(-22);
    assert!(
        least <= exact + slack && exact <= most + slack,
        "{what}: {least} {exact} {most}"
    );
    let mut distinct = values.clone();
    distinct.sort_by(f64::total_cmp);
    distinct.dedup();
    assert!(distinct.len() == 2, "{what}: {distinct:?}");
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let distance = most - least;
    let bound = distance * (2.5 / (values.len() as f64).sqrt() + 2.0_f64.powi(-23)) + slack;
    assert!(
        (mean - exact).abs() <= bound,
        "{what}: {mean} is not {exact} within {bound}"
    );
}

/// What one rounded update may be away from the exact one, computed in double precision from the same state: a code of the
/// signed kind `c` is `(2 c + 1) u` below the next, with `u` at most `largest / 126^2`, and of the unsigned kind with
/// `largest / 254^2`; bf16 has neighbours 2^-7 apart, at most; a 24-bit weight 2^-15, at most, of its value. The fp32
/// arithmetic adds far less than the factor 1.01.
///
/// Catches: a code of the wrong sign or size, a unit of another block, moments taken for one another.
#[test]
fn an_update_is_within_a_step_of_the_exact_one() {
    let weights = numbers(2, LEN, 0.02);
    for format in FORMATS {
        let optimizer: Optimizer = AdamParams::default().into();
        let mut tile = Tile::new(&optimizer, format, &weights);
        for updates in 0..20 {
            let before = (tile.weights(), tile.moments());
            let grad = numbers(30 + updates, LEN, 1e-3);
            let draw = Draw {
                stream: 5,
                updates,
                first: 0,
            };
            tile.step(isa(), &optimizer, draw, &grad, &[0, LEN]);
            let after = (tile.weights(), tile.moments());
            let count = f64::from(updates as u32 + 1);
            let (c1, c2) = (1.0 - 0.9_f64.powf(count), 1.0 - 0.999_f64.powf(count));
            let exact: Vec<(f64, f64, f64)> = (0..LEN)
                .map(|at| {
                    let (p, g) = (f64::from(before.0[at]), f64::from(grad[at]) * 0.7);
                    let m = 0.9 * f64::from(before.1[0][at]) + 0.1 * g;
                    let v = 0.999 * f64::from(before.1[1][at]) + 0.001 * g * g;
                    let p = p - 1e-3 * 1e-2 * p - 1e-3 * (m / c1) / ((v / c2).sqrt() + 1e-8);
                    (p, m, v)
                })
                .collect();
            for (at, (p, m, v)) in exact.iter().enumerate() {
                let block = &exact[at / 64 * 64..LEN.min(at / 64 * 64 + 64)];
                let largest = |of: fn(&(f64, f64, f64)) -> f64| {
                    block.iter().map(|each| of(each).abs()).fold(0.0, f64::max)
                };
                let step = |value: f64, largest: f64, codes: f64| {
                    let unit = (largest / (codes - 1.0).powi(2)).max(2.0_f64.powi(-126));
                    (2.0 * (value.abs() / unit).sqrt() + 1.0) * unit
                };
                let (of_m, of_v, of_p) = if format == Format::Compact {
                    (
                        step(*m, largest(|e| e.1), 127.0),
                        step(*v, largest(|e| e.2), 255.0),
                        2.0_f64.powi(-15),
                    )
                } else {
                    (m.abs() / 128.0, v / 128.0, 0.0)
                };
                // bf16 and fp32 end at subnormal numbers.
                let least = 2.0_f64.powi(-132);
                let got = [after.0[at], after.1[0][at], after.1[1][at]].map(f64::from);
                let of_p = of_p * p.abs() + p.abs() * 1e-6 + 1e-9;
                for (got, exact, bound) in [(got[0], p, of_p), (got[1], m, of_m), (got[2], v, of_v)]
                {
                    assert!(
                        (got - exact).abs() <= bound * 1.01 + least,
                        "{format} element {at} after {updates} updates: {got} is not {exact} within {bound}"
                    );
                }
            }
        }
    }
}

/// Catches: a unit that is not found again, so that a checkpoint's values come to other codes; a weight whose residual is
/// rounded a second time.
#[test]
fn what_was_stored_comes_back_to_its_bits() {
    let weights = numbers(3, LEN, 0.02);
    for format in FORMATS {
        for optimizer in optimizers() {
            let mut tile = Tile::new(&optimizer, format, &weights);
            for updates in 0..60 {
                // Now and then gradients of another size, so that the largest values decay for a while.
                let size = if updates % 20 == 0 { 1.0 } else { 1e-3 };
                let draw = Draw {
                    stream: 8,
                    updates,
                    first: 0,
                };
                tile.step(
                    isa(),
                    &optimizer,
                    draw,
                    &numbers(50 + updates, LEN, size),
                    &[0, LEN],
                );
                let mut again = Tile::new(&optimizer, format, &tile.weights());
                let kept = again
                    .layout
                    .moments()
                    .copied()
                    .collect::<Vec<StateTensor>>();
                for (index, (tensor, values)) in kept.iter().zip(tile.moments()).enumerate() {
                    encode_moment(tensor, &values, &mut again.tensors[2 + index]);
                }
                assert_eq!(
                    again, tile,
                    "{optimizer:?} {format} after {updates} updates"
                );
            }
        }
    }
}

/// Catches: an infinity that becomes a number, a block that is spoilt by its neighbour, a second moment that becomes zero,
/// a huge value that becomes infinite, a negative second moment taken for a positive one.
#[test]
fn values_at_the_edges() {
    let layout = |format| {
        StateLayout::new(
            Dtype::Bf16,
            format,
            &Optimizer::from(AdamParams::default()).moments(),
        )
        .expect("bf16")
    };
    let moments: Vec<StateTensor> = layout(Format::Compact).moments().copied().collect();
    let round_trip = |tensor: &StateTensor, values: &[f32]| {
        let mut bytes = vec![0; tensor.byte_range(&(0..values.len() as u64)).len()];
        encode_moment(tensor, values, &mut bytes);
        let mut out = vec![0.0; values.len()];
        decode_moment(tensor, &bytes, &mut out);
        out
    };
    for tensor in &moments {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 2 * STATE_BLOCK];
            values[5] = wrong;
            let out = round_trip(tensor, &values);
            assert!(
                out[..STATE_BLOCK].iter().all(|value| value.is_nan()),
                "{}",
                tensor.key
            );
            assert!(
                out[STATE_BLOCK..]
                    .iter()
                    .all(|value| (value - 1.0).abs() < 0.01)
            );
        }
        assert!(
            round_trip(tensor, &[0.0, -0.0, 0.0])
                .iter()
                .all(|value| *value == 0.0)
        );
        for huge in [f32::MAX, 1e38, f32::MIN_POSITIVE, 1e-40] {
            let out = round_trip(tensor, &[huge, 0.0, 0.0]);
            let far = (out[0] - huge).abs() / huge;
            assert!(
                out[0].is_finite() && (huge < 1e-37 || far < 0.01),
                "{huge}: {}",
                out[0]
            );
        }
    }
    assert!(
        round_trip(&moments[1], &[-1.0, 1.0])[1].is_nan(),
        "a negative second moment"
    );
    let small = round_trip(&moments[1], &[1.0, 1e-20, 0.0]);
    assert!(small[1] > 0.0 && small[2] == 0.0, "{small:?}");
}

/// Catches: a weight beyond bf16 that becomes infinite, an infinity or a NaN that becomes a number, a weight of 24 bits that
/// is rounded again, a block that a gradient of another one spoils.
#[test]
fn weights_and_gradients_at_the_edges() {
    // Weights: what is beyond bf16 stays finite, and what is not finite is not finite afterwards.
    let adam: Optimizer = AdamParams {
        lr: 0.0,
        weight_decay: 0.0,
        ..AdamParams::default()
    }
    .into();
    for format in FORMATS {
        let weights = [
            f32::MAX,
            -f32::MAX,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            0.0,
            1e-40,
            -1e-40,
        ];
        let mut tile = Tile::new(&adam, format, &weights);
        let before = tile.weights();
        for updates in 0..50 {
            let draw = Draw {
                updates,
                ..Draw::default()
            };
            tile.step(isa(), &adam, draw, &[0.0; 8], &[0, 8]);
        }
        let after = tile.weights();
        assert!(
            after[0].is_finite() && after[1].is_finite(),
            "{format} {after:?}"
        );
        // The arithmetic makes NaN of an infinity times a decay of zero, in every format.
        assert!(
            after[2..4].iter().all(|value| !value.is_finite()),
            "{format}"
        );
        assert!(after[4].is_nan() && after[5] == 0.0, "{format} {after:?}");
        assert_eq!(
            after[6..],
            before[6..],
            "what has 24 bits is not rounded again"
        );
    }
    for format in FORMATS {
        let mut tile = Tile::new(&adam, format, &[1.0; 128]);
        let mut grad = [1e-3; 128];
        grad[70] = f32::INFINITY;
        tile.step(isa(), &adam, Draw::default(), &grad, &[0, 128]);
        let [mean, square] = &tile.moments()[..] else {
            panic!("two moments")
        };
        assert!(!mean[70].is_finite() && !square[70].is_finite(), "{format}");
        assert!(
            mean[..64]
                .iter()
                .chain(&square[..64])
                .all(|value| value.is_finite()),
            "{format}"
        );
    }
}

/// A weight that somebody changed between two updates counts, as in the exact formats: the master is within half of the
/// distance of its neighbours, whatever the residual was.
#[test]
fn an_edited_live_weight_is_taken_over() {
    let sgd: Optimizer = SgdParams {
        lr: 0.0,
        ..SgdParams::default()
    }
    .into();
    for format in FORMATS {
        let mut tile = Tile::new(&sgd, format, &numbers(4, 256, 0.02));
        let edited: Vec<u16> = (0..256).map(|at: u16| 0x3f80 + at % 128).collect();
        tile.tensors[0].copy_from_slice(bytemuck::cast_slice(&edited));
        tile.step(isa(), &sgd, Draw::default(), &[0.0; 256], &[0, 256]);
        let live: &[u16] = bytemuck::cast_slice(&tile.tensors[0]);
        assert_eq!(live, edited, "{format}");
        for (value, bits) in tile.weights().iter().zip(&edited) {
            assert!(
                (value - bf16_to_f32(*bits)).abs() <= 1.0 / 256.0,
                "{format} {value}"
            );
        }
    }
}

#[test]
#[should_panic(expected = "compact rounds: it needs a draw")]
fn an_update_without_a_draw_is_refused() {
    let optimizer: Optimizer = AdamParams::default().into();
    let mut tile = Tile::new(&optimizer, Format::Compact, &[0.0; 64]);
    let tensors = tile.tensors.iter_mut().map(|bytes| &mut bytes[..]);
    zeroxide_optim::update(
        &optimizer.prepare(1, 1.0),
        &tile.layout,
        tensors,
        Grad::F32(&[0.0; 64]),
    );
}

#[test]
#[should_panic(expected = "element 32 is within a block")]
fn a_draw_that_starts_within_a_block_is_refused() {
    let optimizer: Optimizer = AdamParams::default().into();
    let mut tile = Tile::new(&optimizer, Format::Compact, &[0.0; 64]);
    let draw = Draw {
        first: 32,
        ..Draw::default()
    };
    tile.step(isa(), &optimizer, draw, &[0.0; 64], &[0, 64]);
}

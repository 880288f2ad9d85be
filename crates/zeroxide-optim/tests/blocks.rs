//! Block-wise integers against arithmetic in double precision, and that neither the place of a message nor the instruction
//! set changes a bit. That they are the integers of the CUDA kernels is shown by `tests/unit/test_messages.py`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "test data is rounded on purpose"
)]
#![allow(clippy::float_cmp, reason = "results are exact")]

mod random;

use half::{bf16, f16};
use random::Random;
use zeroxide_layout::Dtype;
use zeroxide_optim::{
    BLOCK, CodeBits, Feedback, Isa, add_message, bf16_nearest_even, dequantise, expand, quantise,
    shrink, shrink_with,
};

const BITS: [(CodeBits, f64); 2] = [(CodeBits::Eight, 127.0), (CodeBits::Four, 7.0)];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect(),
        Dtype::Bf16 => values
            .iter()
            .flat_map(|value| bf16::from_f32(*value).to_bits().to_ne_bytes())
            .collect(),
        Dtype::F16 => values
            .iter()
            .flat_map(|value| f16::from_f32(*value).to_bits().to_ne_bytes())
            .collect(),
    }
}

fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_ne_bytes([pair[0], pair[1]]));
    match dtype {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .map(|four| f32::from_ne_bytes(four.try_into().expect("four")))
            .collect(),
        Dtype::Bf16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => pairs.map(|bits| f16::from_bits(bits).to_f32()).collect(),
    }
}

/// Blocks of very different sizes, one of them zero.
fn numbers(seed: u64, blocks: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..blocks * BLOCK)
        .map(|at| (random.normal() * 2.0_f64.powi(3 - 4 * (at / BLOCK % 4) as i32)) as f32)
        .enumerate()
        .map(|(at, value)| if at / BLOCK == 2 { 0.0 } else { value })
        .collect()
}

/// The scale and the nearest multiples of it, by the definition, of one block.
fn oracle(block: &[f32], levels: f64) -> (f64, Vec<f64>) {
    let largest = block
        .iter()
        .fold(0.0_f64, |most, value| most.max(f64::from(value.abs())));
    // The division of the kernels is that of fp32; what lies above it is exact here.
    let exact = f64::from((largest as f32) / (levels as f32));
    let down = bf16::from_f32((exact / 2.0) as f32);
    let scale = (down.to_bits()..down.to_bits() + 512)
        .map(|bits| bf16::from_bits(bits).to_f64())
        .find(|scale| *scale >= exact)
        .expect("a bf16 above");
    let multiples = block.iter().map(|value| {
        if scale == 0.0 {
            0.0
        } else {
            (f64::from(*value) / scale)
                .round_ties_even()
                .clamp(-levels, levels)
                * scale
        }
    });
    (scale, multiples.collect())
}

/// Catches: a scale that is rounded down or to nearest, codes that are cut off, halves in the wrong order, and a last block
/// that is left out.
#[test]
fn what_comes_back_is_the_nearest_multiple_of_the_scale() {
    for (bits, levels) in BITS {
        for dtype in DTYPES {
            let given = bytes(dtype, &numbers(1, 7));
            let mut message = vec![0xaa; bits.message_bytes(7 * BLOCK)];
            quantise(&given, dtype, bits, &mut message);
            let mut back = vec![0_u8; 7 * BLOCK * 4];
            dequantise(&message, Dtype::F32, bits, &mut back);
            let found = values(Dtype::F32, &back);
            for (block, found) in values(dtype, &given).chunks(BLOCK).zip(found.chunks(BLOCK)) {
                let (scale, expected) = oracle(block, levels);
                for ((value, found), expected) in block.iter().zip(found).zip(expected) {
                    // The quotient of fp32 may be on the other side of a tie.
                    let near_tie = ((f64::from(*value) / scale).fract().abs() - 0.5).abs() < 1e-5;
                    assert!(
                        f64::from(*found) == expected || near_tie,
                        "{found} {expected}"
                    );
                }
            }
            // Rounded once more where elements have 16 bits.
            let mut low = given.clone();
            dequantise(&message, dtype, bits, &mut low);
            assert_eq!(low, bytes(dtype, &found));
        }
    }
}

/// Catches: codes overwritten before they are read, and messages that do not begin or end where they must.
#[test]
fn in_place_is_as_beside() {
    for (bits, _) in BITS {
        for dtype in DTYPES {
            for blocks in [1, 2, 3, 16, 65] {
                let given = bytes(dtype, &numbers(2, blocks));
                let size = bits.message_bytes(blocks * BLOCK);
                let mut message = vec![0; size];
                quantise(&given, dtype, bits, &mut message);
                let mut room = given.clone();
                shrink(&mut room, dtype, bits, None);
                assert_eq!(room[..size], message);
                let end = room.len();
                room.fill(0x55);
                room[end - size..].copy_from_slice(&message);
                expand(&mut room, dtype, bits);
                let mut back = vec![0; end];
                dequantise(&message, dtype, bits, &mut back);
                assert_eq!(room, back);
            }
        }
    }
}

/// Catches: a NaN that becomes a number, and a block whose neighbour it spoils.
#[test]
fn what_is_not_finite_is_noticed() {
    for (bits, _) in BITS {
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut given = numbers(3, 2);
            given[BLOCK + 17] = odd;
            let mut message = vec![0; bits.message_bytes(2 * BLOCK)];
            quantise(&bytes(Dtype::F32, &given), Dtype::F32, bits, &mut message);
            let mut sums = vec![1.0; 2 * BLOCK];
            add_message(&mut sums, &message, bits);
            assert!(sums[..BLOCK].iter().all(|sum| sum.is_finite()));
            assert!(sums[BLOCK..].iter().all(|sum| sum.is_nan()));
        }
    }
}

/// Catches: a sum that is stored instead of added, and one in another order than that of the calls.
#[test]
fn messages_add_up() {
    let mut sums = numbers(4, 5);
    let mut expected = sums.clone();
    for seed in 5..8 {
        let mut message = vec![0; CodeBits::Four.message_bytes(5 * BLOCK)];
        quantise(
            &bytes(Dtype::F32, &numbers(seed, 5)),
            Dtype::F32,
            CodeBits::Four,
            &mut message,
        );
        let mut back = vec![0; 5 * BLOCK * 4];
        dequantise(&message, Dtype::F32, CodeBits::Four, &mut back);
        for (sum, value) in expected.iter_mut().zip(values(Dtype::F32, &back)) {
            *sum += value;
        }
        add_message(&mut sums, &message, CodeBits::Four);
    }
    assert_eq!(sums, expected);
}

/// Catches: an instruction set on which a multiplication and an addition are fused, or a fold goes another way.
#[test]
fn every_instruction_set_has_the_same_bits() {
    for dtype in DTYPES {
        let run = |isa| {
            let mut room = bytes(dtype, &numbers(9, 6));
            let mut residual: Vec<u16> = numbers(10, 6)
                .iter()
                .map(|value| bf16_nearest_even(*value))
                .collect();
            let feedback = Feedback {
                residual: &mut residual,
                factor: 0.5,
                beta: 0.8,
            };
            shrink_with(isa, &mut room, dtype, CodeBits::Four, Some(feedback));
            (room, residual)
        };
        let expected = run(Isa::Baseline);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            assert_eq!(run(isa), expected, "{}", isa.name());
        }
    }
}

/// What is sent over `steps` backwards of noisy gradients, against what should have been, summed in double precision:
/// the largest difference of the two sums.
fn drift(steps: u64, beta: Option<f32>, factor: f32) -> f64 {
    let blocks = 4;
    let mut residual = vec![0_u16; blocks * BLOCK];
    let (mut exact, mut sent) = (vec![0.0_f64; blocks * BLOCK], vec![0.0_f64; blocks * BLOCK]);
    let steady = numbers(11, blocks);
    let mut scale = 1.0_f64;
    for step in 0..steps {
        // Every gradient is in other units than the one before, as when the loss scale changes.
        let given: Vec<f32> = numbers(12 + step, blocks)
            .iter()
            .zip(&steady)
            .map(|(noise, value)| ((f64::from(*noise) + f64::from(*value)) * scale) as f32)
            .collect();
        let mut room = bytes(Dtype::F32, &given);
        let feedback = beta.map(|beta| Feedback {
            residual: &mut residual,
            factor: if step == 0 { 1.0 } else { factor },
            beta,
        });
        shrink(&mut room, Dtype::F32, CodeBits::Four, feedback);
        let size = CodeBits::Four.message_bytes(blocks * BLOCK);
        let mut back = vec![0.0; blocks * BLOCK];
        add_message(&mut back, &room[..size], CodeBits::Four);
        for at in 0..back.len() {
            exact[at] += f64::from(given[at]) / scale;
            sent[at] += f64::from(back[at]) / scale;
        }
        scale *= f64::from(factor);
    }
    let apart = exact
        .iter()
        .zip(&sent)
        .map(|(exact, sent)| (exact - sent).abs());
    apart.fold(0.0, f64::max)
}

/// With error feedback the sum of all that was sent stays a bounded distance from the sum of all that should have been:
/// with `d` what a step loses, the sums differ by `e / (1 - beta)`, where `e`, an average of `d`, is what is kept. A step
/// loses at most half a scale, and the scale is at most the largest value over 7, plus what bf16 rounds up. What bf16
/// rounds off of what is kept is lost: 2^-9 of it each step, at random. Without, the losses pile up as a random walk does,
/// or faster where the same value is always rounded the same way.
///
/// Catches: a residual that is never added, added twice, of the wrong sign, or not brought to the present units.
#[test]
fn with_error_feedback_the_mean_of_what_is_sent_is_the_mean_of_what_should_be() {
    const STEPS: u64 = 400;
    // Largest value: 8 times a normal number below 5, of noise and of what is steady each.
    let scale = 2.0 * 8.0 * 5.0 / 7.0 * (1.0 + 2.0_f64.powi(-7));
    for (beta, factor) in [(0.0_f32, 1.0), (0.8, 1.0), (0.8, 0.5), (0.5, 2.0)] {
        let steps = if factor == 1.0 { STEPS } else { 40 };
        let most = scale / 2.0 / f64::from(1.0 - beta);
        let lost = most * 2.0_f64.powi(-9) * steps as f64;
        let found = drift(steps, Some(beta), factor);
        assert!(
            found <= most + lost,
            "beta {beta}, factor {factor}: {found} of {most}"
        );
    }
    let (with, without) = (drift(STEPS, Some(0.0), 1.0), drift(STEPS, None, 1.0));
    assert!(without > 5.0 * with, "{without} without, {with} with");
}

/// Catches: what is kept of a block that is not finite, which would come back in every later step.
#[test]
fn nothing_is_kept_of_what_is_not_finite() {
    let mut given = numbers(13, 2);
    given[3] = f32::NAN;
    let mut residual = vec![bf16_nearest_even(1.0); 2 * BLOCK];
    let feedback = Feedback {
        residual: &mut residual,
        factor: 1.0,
        beta: 0.8,
    };
    let mut room = bytes(Dtype::F32, &given);
    shrink(&mut room, Dtype::F32, CodeBits::Four, Some(feedback));
    assert!(residual[..BLOCK].iter().all(|bits| *bits == 0));
    assert!(residual[BLOCK..].iter().any(|bits| *bits != 0));
}

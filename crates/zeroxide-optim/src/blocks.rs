//! Block-wise integers, as weights and gradients travel between ranks: the codes and scales of `cuda/kernels/quantise.cu`
//! and of `zeroxide.kernels.quantise`, without rounding at random.
//!
//! [`BLOCK`] elements share a bf16 scale, their largest magnitude over the number of levels, rounded up. A code is the
//! nearest multiple of the scale, ties to even. A *message* is block after block: the scale, then the codes, a byte each or
//! two in a byte with the first in the lower half. A block with an infinity or a NaN has the scale NaN, so that only NaN
//! comes back from it: what is not finite is seen by whoever looks at the sum.

use std::array;

use bytemuck::Pod;
use zeroxide_layout::Dtype;

use crate::convert::{BF16_NAN, Bf16, Element, F16, F32, bf16_nearest_even, bf16_to_f32};
use crate::isa::{Isa, isa, per_isa};

/// Elements that share a scale.
pub const BLOCK: usize = 256;
const SCALE: usize = size_of::<u16>();
/// 1.5 * 2^23: adding it rounds a small number to an integer, which is then in the lowest bits of the sum.
const ALIGN: f32 = 12_582_912.0;
const INFINITY: u32 = 0x7f80_0000;

/// How many bits a code has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeBits {
    /// 127 levels on each side of zero.
    Eight,
    /// 7 levels on each side of zero.
    Four,
}

impl CodeBits {
    /// Bytes of a message of `elements`, whole blocks.
    pub const fn message_bytes(self, elements: usize) -> usize {
        let codes = match self {
            Self::Eight => BLOCK,
            Self::Four => BLOCK / 2,
        };
        elements / BLOCK * (SCALE + codes)
    }
}

/// What quantising has changed, kept for the next values of the same elements (`LoCo`, Xie et al. 2024).
///
/// With `e` what was kept, of the units that values had then, `x` the values and `q` what comes back of `x + factor e`:
/// afterwards `e = beta factor e + (1 - beta) (x + factor e - q)` is kept.
#[derive(Debug)]
pub struct Feedback<'a> {
    /// What is kept, bf16 bits, one for each element.
    pub residual: &'a mut [u16],
    /// What the units of values have been multiplied with since.
    pub factor: f32,
    /// Weight of what was kept before.
    pub beta: f32,
}

trait Code {
    const LEVELS: f32;
    const BYTES: usize;
    fn put(codes: &mut [u8], values: &[i32; BLOCK]);
    fn get(codes: &[u8]) -> [i32; BLOCK];
}

struct Int8;
struct Int4;

impl Code for Int8 {
    const LEVELS: f32 = 127.0;
    const BYTES: usize = BLOCK;

    #[inline(always)]
    fn put(codes: &mut [u8], values: &[i32; BLOCK]) {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = value.to_le_bytes()[0];
        }
    }

    #[inline(always)]
    fn get(codes: &[u8]) -> [i32; BLOCK] {
        array::from_fn(|at| i32::from(codes[at].cast_signed()))
    }
}

impl Code for Int4 {
    const LEVELS: f32 = 7.0;
    const BYTES: usize = BLOCK / 2;

    #[inline(always)]
    fn put(codes: &mut [u8], values: &[i32; BLOCK]) {
        for (code, pair) in codes.iter_mut().zip(values.as_chunks::<2>().0) {
            *code = (pair[0] & 15 | (pair[1] & 15) << 4).to_le_bytes()[0];
        }
    }

    #[inline(always)]
    fn get(codes: &[u8]) -> [i32; BLOCK] {
        let mut values = [0; BLOCK];
        for (pair, code) in values.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            let code = i32::from(*code);
            *pair = [((code & 15) ^ 8) - 8, ((code >> 4) ^ 8) - 8];
        }
        values
    }
}

macro_rules! dispatch {
    ($bits:expr, $dtype:expr, $call:ident::<$element:ident, $code:ident>($($arg:expr),*)) => {
        match ($bits, $dtype) {
            (CodeBits::Eight, Dtype::F32) => $call::<F32, Int8>($($arg),*),
            (CodeBits::Eight, Dtype::Bf16) => $call::<Bf16, Int8>($($arg),*),
            (CodeBits::Eight, Dtype::F16) => $call::<F16, Int8>($($arg),*),
            (CodeBits::Four, Dtype::F32) => $call::<F32, Int4>($($arg),*),
            (CodeBits::Four, Dtype::Bf16) => $call::<Bf16, Int4>($($arg),*),
            (CodeBits::Four, Dtype::F16) => $call::<F16, Int4>($($arg),*),
        }
    };
}

/// Quantises the elements of `room` in place: its first [`message_bytes`](CodeBits::message_bytes) are the message.
///
/// # Panics
/// If `room` does not hold whole blocks of aligned elements, or a residual as many elements.
pub fn shrink(room: &mut [u8], dtype: Dtype, bits: CodeBits, feedback: Option<Feedback<'_>>) {
    shrink_with(isa(), room, dtype, bits, feedback);
}

/// [`shrink`] on a given instruction set, with the same bits.
///
/// # Panics
/// As there, or if the processor has no such instructions.
pub fn shrink_with(
    isa: Isa,
    room: &mut [u8],
    dtype: Dtype,
    bits: CodeBits,
    feedback: Option<Feedback<'_>>,
) {
    match feedback {
        Some(Feedback {
            residual,
            factor,
            beta,
        }) => {
            assert_eq!(residual.len() * dtype.size(), room.len(), "{WHOLE}");
            dispatch!(
                bits,
                dtype,
                shrink_kernel::<E, C>(isa, room, residual, factor, beta)
            );
        }
        None => dispatch!(
            bits,
            dtype,
            shrink_kernel::<E, C>(isa, room, &mut [], 0.0, 0.0)
        ),
    }
}

/// Brings the message at the end of `room` back, in place: afterwards the elements fill it.
///
/// # Panics
/// As [`shrink`].
pub fn expand(room: &mut [u8], dtype: Dtype, bits: CodeBits) {
    dispatch!(bits, dtype, expand_kernel::<E, C>(isa(), room));
}

/// Quantises the elements whose bytes are `values` into `message`.
///
/// # Panics
/// If lengths do not fit, or elements are not aligned.
pub fn quantise(values: &[u8], dtype: Dtype, bits: CodeBits, message: &mut [u8]) {
    dispatch!(bits, dtype, quantise_kernel::<E, C>(isa(), values, message));
}

/// Brings a message back as the elements whose bytes are `values`.
///
/// # Panics
/// As [`quantise`].
pub fn dequantise(message: &[u8], dtype: Dtype, bits: CodeBits, values: &mut [u8]) {
    dispatch!(
        bits,
        dtype,
        dequantise_kernel::<E, C>(isa(), message, values)
    );
}

/// Adds what a message stands for to `sums`.
///
/// # Panics
/// If lengths do not fit.
pub fn add_message(sums: &mut [f32], message: &[u8], bits: CodeBits) {
    match bits {
        CodeBits::Eight => add_kernel::<Int8>(isa(), sums, message),
        CodeBits::Four => add_kernel::<Int4>(isa(), sums, message),
    }
}

const WHOLE: &str = "expected whole blocks, and as many in all that belongs together";

per_isa! {
    fn shrink_kernel[E: Element<Bits: Pod>, C: Code][E, C](
        room: &mut [u8], residual: &mut [u16], factor: f32, beta: f32,
    ) = shrink_loop::<E, C>(room, residual, factor, beta);
}

per_isa! {
    fn expand_kernel[E: Element<Bits: Pod>, C: Code][E, C](room: &mut [u8]) = expand_loop::<E, C>(room);
}

per_isa! {
    fn quantise_kernel[E: Element<Bits: Pod>, C: Code][E, C](
        values: &[u8], message: &mut [u8],
    ) = quantise_loop::<E, C>(values, message);
}

per_isa! {
    fn dequantise_kernel[E: Element<Bits: Pod>, C: Code][E, C](
        message: &[u8], values: &mut [u8],
    ) = dequantise_loop::<E, C>(message, values);
}

per_isa! {
    fn add_kernel[C: Code][C](sums: &mut [f32], message: &[u8]) = add_loop::<C>(sums, message);
}

/// Bytes of a block's elements, and of its part of a message.
const fn sizes<E: Element, C: Code>() -> (usize, usize) {
    (BLOCK * size_of::<E::Bits>(), SCALE + C::BYTES)
}

#[inline(always)]
fn shrink_loop<E: Element<Bits: Pod>, C: Code>(
    room: &mut [u8],
    residual: &mut [u16],
    factor: f32,
    beta: f32,
) {
    let (size, part) = sizes::<E, C>();
    assert!(room.len().is_multiple_of(size), "{WHOLE}");
    let mut kept = residual.as_chunks_mut::<BLOCK>().0.iter_mut();
    for block in 0..room.len() / size {
        let mut values = load::<E>(&room[block * size..(block + 1) * size]);
        let to = &mut room[block * part..(block + 1) * part];
        let Some(kept) = kept.next() else {
            encode::<C>(&values, to);
            continue;
        };
        let before: [f32; BLOCK] = array::from_fn(|at| bf16_to_f32(kept[at]) * factor);
        for (value, before) in values.iter_mut().zip(&before) {
            *value += before;
        }
        let (scale, codes) = encode::<C>(&values, to);
        if scale.is_nan() {
            kept.fill(0);
            continue;
        }
        let back: [f32; BLOCK] = array::from_fn(|at| of_code(codes[at], scale));
        for (((kept, before), value), back) in kept.iter_mut().zip(&before).zip(&values).zip(&back)
        {
            *kept = bf16_nearest_even(beta * before + (1.0 - beta) * (value - back));
        }
    }
}

#[inline(always)]
fn expand_loop<E: Element<Bits: Pod>, C: Code>(room: &mut [u8]) {
    let (size, part) = sizes::<E, C>();
    assert!(room.len().is_multiple_of(size), "{WHOLE}");
    let blocks = room.len() / size;
    // An element has more bytes than a code: what is written never reaches the codes of a later block.
    let start = blocks * (size - part);
    for block in 0..blocks {
        let at = start + block * part;
        let values = decode::<C>(&room[at..at + part]);
        store::<E>(&values, &mut room[block * size..(block + 1) * size]);
    }
}

#[inline(always)]
fn quantise_loop<E: Element<Bits: Pod>, C: Code>(values: &[u8], message: &mut [u8]) {
    let (size, part) = sizes::<E, C>();
    assert!(values.len().is_multiple_of(size), "{WHOLE}");
    assert_eq!(values.len() / size * part, message.len(), "{WHOLE}");
    for (values, to) in values
        .chunks_exact(size)
        .zip(message.chunks_exact_mut(part))
    {
        encode::<C>(&load::<E>(values), to);
    }
}

#[inline(always)]
fn dequantise_loop<E: Element<Bits: Pod>, C: Code>(message: &[u8], values: &mut [u8]) {
    let (size, part) = sizes::<E, C>();
    assert!(values.len().is_multiple_of(size), "{WHOLE}");
    assert_eq!(values.len() / size * part, message.len(), "{WHOLE}");
    for (from, values) in message
        .chunks_exact(part)
        .zip(values.chunks_exact_mut(size))
    {
        store::<E>(&decode::<C>(from), values);
    }
}

#[inline(always)]
fn add_loop<C: Code>(sums: &mut [f32], message: &[u8]) {
    let part = SCALE + C::BYTES;
    assert!(sums.len().is_multiple_of(BLOCK), "{WHOLE}");
    assert_eq!(sums.len() / BLOCK * part, message.len(), "{WHOLE}");
    for (from, sums) in message.chunks_exact(part).zip(sums.chunks_exact_mut(BLOCK)) {
        for (sum, value) in sums.iter_mut().zip(decode::<C>(from)) {
            *sum += value;
        }
    }
}

#[inline(always)]
fn load<E: Element<Bits: Pod>>(bytes: &[u8]) -> [f32; BLOCK] {
    let elements: &[E::Bits] = bytemuck::cast_slice(bytes);
    array::from_fn(|at| E::load(elements[at]))
}

#[inline(always)]
fn store<E: Element<Bits: Pod>>(values: &[f32; BLOCK], bytes: &mut [u8]) {
    let elements: &mut [E::Bits] = bytemuck::cast_slice_mut(bytes);
    for (element, value) in elements.iter_mut().zip(values) {
        *element = E::store(*value);
    }
}

/// Writes a block's scale and codes, and returns them.
#[inline(always)]
fn encode<C: Code>(values: &[f32; BLOCK], to: &mut [u8]) -> (f32, [i32; BLOCK]) {
    // Magnitudes are ordered as their bits are, with infinity and then NaN above all numbers.
    let magnitudes = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
    let largest = magnitudes.fold(0, u32::max);
    let bits = if largest < INFINITY {
        bf16_up(f32::from_bits(largest) / C::LEVELS)
    } else {
        BF16_NAN
    };
    let scale = bf16_to_f32(bits);
    // No quotient is beyond the levels by more than its own rounding: the scale is no smaller than its quotient was.
    let codes = if scale > 0.0 {
        array::from_fn(|at| {
            let rounded = (values[at] / scale + ALIGN).to_bits().cast_signed();
            rounded - ALIGN.to_bits().cast_signed()
        })
    } else {
        [0; BLOCK]
    };
    let (first, rest) = to.split_at_mut(SCALE);
    first.copy_from_slice(&bits.to_ne_bytes());
    C::put(rest, &codes);
    (scale, codes)
}

/// The values of a block of a message.
#[inline(always)]
fn decode<C: Code>(from: &[u8]) -> [f32; BLOCK] {
    let scale = bf16_to_f32(u16::from_ne_bytes([from[0], from[1]]));
    let codes = C::get(&from[SCALE..]);
    // Beyond the largest number where the scale was rounded up, which it then stands for.
    let values = array::from_fn(|at| of_code(codes[at], scale).clamp(f32::MIN, f32::MAX));
    if scale.is_nan() {
        [scale; BLOCK]
    } else {
        values
    }
}

/// The number that a code stands for: exactly, since a code has 7 bits beside its sign and a scale 8.
#[inline(always)]
fn of_code(code: i32, scale: f32) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "a code has 8 bits")]
    let code = code as f32;
    code * scale
}

/// The smallest bf16 that is not below a number of at least 0.
#[inline(always)]
fn bf16_up(value: f32) -> u16 {
    ((value.to_bits() + 0xffff) >> 16) as u16
}

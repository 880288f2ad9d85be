//! A rule's own tensors where they are kept in fewer bits than fp32, a block of 64 elements at a time.
//!
//! Within an update every value is rounded at random to one of its two neighbours, with probabilities that make the mean
//! of the result the value itself. Values that are given (a checkpoint's, a user's) are rounded to the nearest; one that
//! stands for what is stored gives the same bits back.

mod blocks;

use zeroxide_layout::{Dtype, STATE_BLOCK, StateDtype, StateTensor};

use super::carried::Carried;
use super::compact::round_magnitude;
use super::values::widen;
use crate::convert::{bf16_nearest_even, bf16_to_f32, canonical};
use crate::draw::Words;

pub(crate) use blocks::Blocks;

/// The values of a block; those beyond the end of a parameter are zero.
pub(crate) type Values = [f32; STATE_BLOCK];

/// One way to keep a rule's own tensors.
pub(crate) trait Moments {
    /// Bytes of that many elements.
    fn bytes(elements: usize) -> usize;

    /// Reads a block, or the elements that the last one has. `signed`: values may be negative.
    fn load(bytes: &[u8], signed: bool) -> Values;

    /// Writes it, rounded by the `words` of its elements. `second`: it is the second of the rule's tensors.
    fn store(values: &Values, signed: bool, words: &Words, second: bool, bytes: &mut [u8]);
}

/// An element of a tensor that a rule has, or `()` where it has none.
pub(crate) trait Remembered: Carried {
    /// Whether there is one.
    const IS_KEPT: bool;
}

impl Remembered for f32 {
    const IS_KEPT: bool = true;
}

impl Remembered for () {
    const IS_KEPT: bool = false;
}

/// bf16, 16 random bits an element.
pub(crate) struct Bf16Moments;

impl Moments for Bf16Moments {
    #[inline(always)]
    fn bytes(elements: usize) -> usize {
        elements * size_of::<u16>()
    }

    #[inline(always)]
    fn load(bytes: &[u8], _signed: bool) -> Values {
        let whole = padded(bytemuck::cast_slice::<u8, u16>(bytes));
        let mut values = [0.0; STATE_BLOCK];
        for (value, bits) in values.iter_mut().zip(&whole) {
            *value = bf16_to_f32(*bits);
        }
        values
    }

    #[inline(always)]
    fn store(values: &Values, _signed: bool, words: &Words, second: bool, bytes: &mut [u8]) {
        let shift = if second { 16 } else { 0 };
        let mut rounded = [0; STATE_BLOCK];
        for ((rounded, value), word) in rounded.iter_mut().zip(values).zip(words) {
            let value = round_magnitude(canonical(*value), (word >> shift) & 0xffff, 0xffff);
            *rounded = (value.to_bits() >> 16) as u16;
        }
        give_back(&rounded, bytemuck::cast_slice_mut(bytes));
    }
}

/// The elements of a block, zeros after the last of them.
#[inline(always)]
pub(crate) fn padded<T: Copy + Default>(elements: &[T]) -> [T; STATE_BLOCK] {
    // Whole blocks, which are nearly all, are copied as such.
    <[T; STATE_BLOCK]>::try_from(elements).unwrap_or_else(|_| {
        let mut block = [T::default(); STATE_BLOCK];
        block[..elements.len()].copy_from_slice(elements);
        block
    })
}

/// Writes as many elements of a block as there are.
#[inline(always)]
pub(crate) fn give_back<T: Copy>(block: &[T; STATE_BLOCK], elements: &mut [T]) {
    if let Ok(whole) = <&mut [T; STATE_BLOCK]>::try_from(&mut *elements) {
        *whole = *block;
    } else {
        elements.copy_from_slice(&block[..elements.len()]);
    }
}

/// Stores values of a rule's own tensor, from the start of a block on: rounded to the nearest where the format rounds.
/// Values that [`decode_moment`] has read come to the bits that it read.
///
/// # Panics
/// If `bytes` are not those of as many elements.
pub fn encode_moment(tensor: &StateTensor, values: &[f32], bytes: &mut [u8]) {
    let expected = tensor.bytes(values.len() as u64);
    assert_eq!(
        bytes.len() as u64,
        expected,
        "values and tensor differ in length"
    );
    match tensor.dtype {
        StateDtype::Float(Dtype::Bf16) => {
            let stored: &mut [u16] = bytemuck::cast_slice_mut(bytes);
            for (stored, value) in stored.iter_mut().zip(values) {
                *stored = bf16_nearest_even(*value);
            }
        }
        StateDtype::Blocks { signed } => {
            let blocks = bytes.chunks_exact_mut(Blocks::bytes(STATE_BLOCK));
            for (values, bytes) in values.chunks(STATE_BLOCK).zip(blocks) {
                Blocks::encode(&padded(values), signed, bytes);
            }
        }
        _ => bytemuck::cast_slice_mut(bytes).copy_from_slice(values),
    }
}

/// The values of a rule's own tensor, from the start of a block on.
///
/// # Panics
/// If `bytes` are not those of as many elements.
pub fn decode_moment(tensor: &StateTensor, bytes: &[u8], out: &mut [f32]) {
    let expected = tensor.bytes(out.len() as u64);
    assert_eq!(
        bytes.len() as u64,
        expected,
        "values and tensor differ in length"
    );
    match tensor.dtype {
        StateDtype::Float(dtype) => widen(dtype, bytes, out),
        StateDtype::Blocks { signed } => {
            let blocks = bytes.chunks_exact(Blocks::bytes(STATE_BLOCK));
            for (out, bytes) in out.chunks_mut(STATE_BLOCK).zip(blocks) {
                out.copy_from_slice(&Blocks::load(bytes, signed)[..out.len()]);
            }
        }
        StateDtype::Int16 | StateDtype::Int8 => panic!("{} is not a rule's own", tensor.key),
    }
}

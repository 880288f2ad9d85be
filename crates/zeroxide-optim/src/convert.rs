//! Conversions between fp32 and the 16-bit formats, free of branches so that loops over them vectorise.

/// The canonical quiet NaN, whose upper half is the canonical bf16 one.
pub(crate) const NAN_BITS: u32 = 0x7fc0_0000;

/// The bf16 that every NaN becomes.
pub(crate) const BF16_NAN: u16 = 0x7fc0;
/// The fp16 that every NaN becomes.
pub(crate) const F16_NAN: u16 = 0x7e00;

/// `x`, with every NaN made the canonical quiet one: which payload and sign survive an operation on two
/// NaNs is up to the compiler.
#[inline(always)]
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() {
        f32::from_bits(NAN_BITS)
    } else {
        x
    }
}

/// bf16 bits to fp32, exactly.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// fp32 to bf16 bits, rounded to nearest, ties away from zero; NaN becomes `0x7fc0`.
///
/// This is the rounding of live weights: it differs from [`bf16_nearest_even`] on exact ties only, and
/// unlike it leaves a signed 16-bit residual that gives the fp32 value back (see [`split`](crate::split)).
/// A finite value may round to infinity, as with any rounding to nearest.
#[inline(always)]
pub fn bf16_half_up(value: f32) -> u16 {
    let rounded = (value.to_bits().wrapping_add(0x8000) >> 16) as u16;
    if value.is_nan() { BF16_NAN } else { rounded }
}

/// [`bf16_half_up`] of a value whose every NaN is the [`canonical`] one, which the rounding leaves as it is.
#[inline(always)]
pub(crate) fn half_up_of_canonical(value: f32) -> u16 {
    (value.to_bits().wrapping_add(0x8000) >> 16) as u16
}

/// fp32 to bf16 bits, rounded to nearest, ties to even, as torch casts; NaN becomes `0x7fc0`.
#[inline(always)]
pub fn bf16_nearest_even(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if value.is_nan() { BF16_NAN } else { rounded }
}

/// fp16 bits to fp32, exactly; a NaN keeps its sign and payload.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00 << 13;
    const REBIAS: u32 = (127 - 15) << 23;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let exponent = magnitude & EXPONENT;
    let normal = magnitude + REBIAS;
    // Infinity and NaN: the exponent goes on to 255.
    let special = normal + REBIAS;
    // Zero and subnormals: give the fraction the exponent of 2^-14, then take the implicit one away.
    let tiny = f32::from_bits(normal + (1 << 23)) - f32::from_bits(113 << 23);
    let finite = if exponent == 0 {
        tiny.to_bits()
    } else {
        normal
    };
    let unsigned = if exponent == EXPONENT {
        special
    } else {
        finite
    };
    f32::from_bits(unsigned | (u32::from(bits & 0x8000) << 16))
}

/// fp32 to fp16 bits, rounded to nearest, ties to even, as torch casts; overflow becomes infinity, NaN
/// becomes `0x7e00`.
#[expect(clippy::cast_possible_truncation, reason = "the value has 16 bits")]
#[inline(always)]
pub fn f16_nearest_even(value: f32) -> u16 {
    // 2^16, the first magnitude beyond every rounding to a finite fp16.
    const OVERFLOW: u32 = (127 + 16) << 23;
    // 2^-14, the smallest normal fp16.
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    // 0.5, whose last fraction bit is worth 2^-24, the smallest fp16: adding it rounds there.
    const ALIGN: u32 = 126 << 23;
    let sign = (value.to_bits() >> 16) & 0x8000;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude
        .wrapping_sub((127 - 15) << 23)
        .wrapping_add(0xfff + odd)
        >> 13;
    let tiny = (f32::from_bits(magnitude) + f32::from_bits(ALIGN))
        .to_bits()
        .wrapping_sub(ALIGN);
    let finite = if magnitude < SMALLEST_NORMAL {
        tiny
    } else {
        normal
    };
    let unsigned = if magnitude >= OVERFLOW {
        0x7c00
    } else {
        finite
    };
    if value.is_nan() {
        F16_NAN
    } else {
        (unsigned | sign) as u16
    }
}

/// A storage dtype as the kernels see it: how one element is read as fp32 and written from fp32.
pub(crate) trait Element {
    /// The element as it lies in memory.
    type Bits: Copy + Default;
    /// Reads one element, exactly.
    fn load(bits: Self::Bits) -> f32;
    /// Writes one element, rounded to nearest, ties to even.
    fn store(value: f32) -> Self::Bits;
}

/// fp32 elements.
pub(crate) struct F32;
/// bf16 elements.
pub(crate) struct Bf16;
/// fp16 elements.
pub(crate) struct F16;

impl Element for F32 {
    type Bits = f32;
    #[inline(always)]
    fn load(bits: f32) -> f32 {
        bits
    }
    #[inline(always)]
    fn store(value: f32) -> f32 {
        value
    }
}

impl Element for Bf16 {
    type Bits = u16;
    #[inline(always)]
    fn load(bits: u16) -> f32 {
        bf16_to_f32(bits)
    }
    #[inline(always)]
    fn store(value: f32) -> u16 {
        bf16_nearest_even(value)
    }
}

impl Element for F16 {
    type Bits = u16;
    #[inline(always)]
    fn load(bits: u16) -> f32 {
        f16_to_f32(bits)
    }
    #[inline(always)]
    fn store(value: f32) -> u16 {
        f16_nearest_even(value)
    }
}

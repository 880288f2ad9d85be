//! How an fp32 value carries an element of a tensor that makes weights exact, whichever format the element is of.

use crate::slot::Slot;

/// An element that travels in the bits of an fp32 value.
pub(crate) trait Carried: Slot + Default {
    /// The value that carries it.
    fn carry(self) -> f32;

    /// The element that [`carry`](Self::carry) put there.
    fn carried(value: f32) -> Self;
}

impl Carried for () {
    #[inline(always)]
    fn carry(self) -> f32 {
        0.0
    }

    #[inline(always)]
    fn carried(_: f32) {}
}

/// A master weight.
impl Carried for f32 {
    #[inline(always)]
    fn carry(self) -> f32 {
        self
    }

    #[inline(always)]
    fn carried(value: f32) -> Self {
        value
    }
}

/// A residual.
impl Carried for u16 {
    #[inline(always)]
    fn carry(self) -> f32 {
        f32::from_bits(u32::from(self))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "it was widened")]
    fn carried(value: f32) -> Self {
        value.to_bits() as Self
    }
}

/// A residual of 8 bits.
impl Carried for u8 {
    #[inline(always)]
    fn carry(self) -> f32 {
        f32::from_bits(u32::from(self))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "it was widened")]
    fn carried(value: f32) -> Self {
        value.to_bits() as Self
    }
}

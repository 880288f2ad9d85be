//! How a weight with all its bits is stored: as the live weight that forward and backward use, and a tensor that makes it
//! exact.
//!
//! A codec takes a weight apart and puts it together again, one element at a time. Kernels are compiled for every rule
//! with every codec; [`values`] does the same for whole slices where state is filled, read and edited.

pub(crate) mod carried;
pub(crate) mod compact;
pub(crate) mod fp32;
pub(crate) mod moments;
pub(crate) mod split;
pub(crate) mod values;

use bytemuck::Pod;
use zeroxide_layout::StateLayout;

use crate::slot::Slot;
use carried::Carried;

/// One way to store weights.
pub(crate) trait Codec {
    /// Element of the live weight.
    type Live: Slot + Pod + Default;
    /// Element of the tensor that makes it exact; `()` where it is exact by itself.
    type Exact: Carried;
    /// Whether the exact tensor alone says what the weight is, as long as nobody has changed the live weight.
    const EXACT_SUFFICES: bool;

    /// The weight that the pair stands for. A live weight that is not what [`encode`](Self::encode) gave was changed by
    /// somebody, and replaces what is stored beside it.
    fn decode(live: Self::Live, exact: Self::Exact) -> f32;

    /// Takes a weight apart. Every NaN becomes the canonical one.
    fn encode(weight: f32) -> (Self::Live, Self::Exact);

    /// [`encode`](Self::encode) within an update, which rounds by the lowest byte of a random word what cannot be kept.
    #[inline(always)]
    fn encode_drawn(weight: f32, _word: u32) -> (Self::Live, Self::Exact) {
        Self::encode(weight)
    }

    /// The live weight for a value that a user gives.
    #[inline(always)]
    fn given(value: f32) -> Self::Live {
        Self::encode(value).0
    }
}

/// Runs `$body` with the type `$codec` that stores what `$layout` describes.
macro_rules! with_codec {
    ($layout:expr, $codec:ident => $body:expr) => {{
        use zeroxide_layout::{Dtype, Format};
        let layout: &zeroxide_layout::StateLayout = $layout;
        match (layout.format(), layout.compute()) {
            (Format::Fp32, Dtype::F32) => {
                type $codec = $crate::codec::fp32::Whole;
                $body
            }
            (Format::Fp32, Dtype::Bf16) => {
                type $codec = $crate::codec::fp32::MasterBf16;
                $body
            }
            (Format::Fp32, Dtype::F16) => {
                type $codec = $crate::codec::fp32::MasterF16;
                $body
            }
            (Format::Compact, _) => {
                type $codec = $crate::codec::compact::Compact;
                $body
            }
            (Format::Split | Format::SplitBf16, _) => {
                type $codec = $crate::codec::split::Split;
                $body
            }
        }
    }};
}
pub(crate) use with_codec;

/// See [`Codec::EXACT_SUFFICES`].
pub fn exact_suffices(layout: &StateLayout) -> bool {
    with_codec!(layout, C => C::EXACT_SUFFICES)
}

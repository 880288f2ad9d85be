//! CPU optimizer kernels: one pass over a tile of optimizer state.
//!
//! What lives here:
//! - [`update`]: one step of a rule ([`Optimizer`]) over the state tensors of a tile, in an exact storage format. They run
//!   the same per-element arithmetic and give the same bits. [`update_drawn`]: the same in any format; those that are not
//!   exact run it too, and then round at random ([`Draw`]).
//! - [`accumulate`]: a gradient arriving in its home buffer, stored or accumulated, with its squared norm and
//!   the non-finite check taken in the same pass.
//! - [`sum_scaled`]: the sum of several ranks' gradients, in their order.
//! - [`quantise`] and its neighbours: block-wise integers, as weights and gradients travel between ranks.
//! - [`split`] and [`join`]: an fp32 master weight as a live bf16 weight and a 16-bit residual; [`encode_live`] and its
//!   neighbours: whole values in and out of any format.
//! - [`Pool`]: the threads that the kernels run on, its own and those of an OpenMP runtime that is there anyway.
//!
//! What this crate never does: allocate on the hot path, read the environment, or let the result depend
//! on how the work was cut. Every kernel is one plain loop whose elements do not depend on one another,
//! written with explicit [`f32::mul_add`] and compiled for each instruction set ([`Isa`]); therefore the
//! bits are the same for every instruction set, thread count, slice boundary and alignment.

mod accumulate;
mod blocks;
mod codec;
mod convert;
mod draw;
mod error;
mod grad;
mod isa;
mod kernel;
mod openmp;
mod pool;
mod rounding;
mod rules;
mod slot;
mod sum;

pub use accumulate::{
    Accumulate, AccumulateStats, GradMut, accumulate, accumulate_with, measure, measure_with,
};
pub use blocks::{
    BLOCK, CodeBits, Feedback, add_message, dequantise, expand, quantise, shrink, shrink_with,
};
pub use codec::exact_suffices;
pub use codec::moments::{decode_moment, encode_moment};
pub use codec::split::{join, split, with_bf16, with_f16};
pub use codec::values::{carry_exact, encode_exact, encode_live, join_live, widen};
pub use convert::{bf16_half_up, bf16_nearest_even, bf16_to_f32, f16_nearest_even, f16_to_f32};
pub use draw::Draw;
pub use error::OptimError;
pub use grad::Grad;
pub use isa::{Isa, isa};
pub use kernel::{update, update_drawn, update_drawn_with, update_with};
pub use pool::Pool;
pub use rules::*;
pub use sum::{sum_scaled, sum_scaled_with};

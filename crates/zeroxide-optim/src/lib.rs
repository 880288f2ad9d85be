//! CPU optimizer kernels: one pass over a tile of optimizer state.
//!
//! What lives here:
//! - [`step_fp32`] and [`step_split`]: Adam and `AdamW` over the two exact state formats. Both run the
//!   same per-element arithmetic and give the same bits.
//! - [`accumulate`]: a gradient arriving in its home buffer, stored or accumulated, with its squared norm and
//!   the non-finite check taken in the same pass.
//! - [`sum_scaled`]: the sum of several ranks' gradients, in their order.
//! - [`split`] and [`join`]: an fp32 master weight as a live bf16 weight and a 16-bit residual.
//! - [`Pool`]: worker threads with a fixed map from task to thread.
//!
//! What this crate never does: allocate on the hot path, read the environment, or let the result depend
//! on how the work was cut. Every kernel is one plain loop whose elements do not depend on one another,
//! written with explicit [`f32::mul_add`] and compiled for each instruction set ([`Isa`]); therefore the
//! bits are the same for every instruction set, thread count, slice boundary and alignment.

mod accumulate;
mod adam;
mod convert;
mod error;
mod formula;
mod isa;
mod pool;
mod split;
mod sum;

pub use accumulate::{Accumulate, AccumulateStats, GradMut, accumulate, accumulate_with};
pub use adam::{AdamParams, AdamStep, Grad, LowOut};
pub use adam::{step_fp32, step_fp32_with, step_split, step_split_with};
pub use convert::{bf16_half_up, bf16_nearest_even, bf16_to_f32, f16_nearest_even, f16_to_f32};
pub use error::OptimError;
pub use isa::{Isa, isa};
pub use pool::Pool;
pub use split::{join, join_slice, split, split_slice, with_bf16, with_f16};
pub use sum::{sum_scaled, sum_scaled_with};

//! Where every element of the training state lies: dtypes, state formats, the flat layout of a unit,
//! shards and tiles.
//!
//! This crate is arithmetic only. It allocates nothing but the small tables that describe a layout,
//! touches no memory, file or device, and contains no `unsafe`. Offsets and lengths are `u64`, counted
//! in *elements* unless a name says `bytes`.

#![forbid(unsafe_code)]

mod align;
mod block;
mod dtype;
mod error;
mod format;
mod state;
mod tiling;
mod unit;

pub use align::{FRAME, PAGE, align_up, checked_align_up, checked_align_up_usize};
pub use block::BlockId;
pub use dtype::Dtype;
pub use error::LayoutError;
pub use format::Format;
pub use state::{
    Moment, Role, STATE_BLOCK, STATE_BLOCK_BYTES, StateDtype, StateKey, StateLayout, StateTensor,
};
pub use tiling::{TILE_QUANTUM, Tiling};
pub use unit::{Location, PARAM_ALIGN, ParamPiece, ParamShape, SHARD_ALIGN, UnitLayout};

//! One optimizer step: its constants, the stream of tiles, and the update of one tile.

mod lent;
mod plan;
pub(crate) mod stream;
mod update;

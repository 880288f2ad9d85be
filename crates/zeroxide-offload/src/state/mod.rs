//! Values of weights and optimizer state: filled, read and replaced, parameter by parameter.

mod edit;
pub(crate) mod fill;
mod raw;
pub(crate) mod read;

use crate::state::fill::Fill;
use crate::state::read::CachedTile;

/// What calls about whole values leave for the next one.
#[derive(Default)]
pub(crate) struct State {
    /// The unit that is being filled.
    pub(crate) fill: Option<Fill>,
    /// Tiles read last; empty whenever a block may have changed since.
    pub(crate) cache: Vec<CachedTile>,
}

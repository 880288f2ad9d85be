//! What can be wrong with a layout.

use thiserror::Error;

use crate::{Dtype, Format, StateKey};

/// A layout that cannot be made, or a question it cannot answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// The text names no supported element type.
    #[error("unknown dtype `{text}`; expected float32, bfloat16 or float16")]
    UnknownDtype {
        /// The text as given.
        text: String,
    },
    /// The text names no state format.
    #[error("unknown state format `{text}`; expected fp32, split, split-bf16 or compact")]
    UnknownFormat {
        /// The text as given.
        text: String,
    },
    /// The state format is not defined for this compute dtype.
    #[error(
        "state format `{format}` does not support compute dtype {dtype}; use `fp32`, or bfloat16 with `{format}`"
    )]
    Unsupported {
        /// The requested format.
        format: Format,
        /// The requested compute dtype.
        dtype: Dtype,
    },
    /// The state format cannot keep what a tensor starts from.
    #[error(
        "state format `{format}` keeps {name} rounded, which must start from 0 then; use `fp32` or `split`, or start it from 0"
    )]
    Initial {
        /// The requested format.
        format: Format,
        /// The tensor.
        name: StateKey,
    },
    /// A size does not fit a signed 64-bit byte offset.
    #[error("{what}: size exceeds a 64-bit byte offset")]
    TooLarge {
        /// What was being sized.
        what: &'static str,
    },
    /// The world has no ranks.
    #[error("world size is 0; expected at least 1 rank")]
    EmptyWorld,
    /// A length or tile is not a whole number of tile quanta.
    #[error("{what} is {got} elements; expected a multiple of {quantum}, and a tile above 0")]
    TileQuantum {
        /// `length` or `tile`.
        what: &'static str,
        /// The number given, in elements.
        got: u64,
        /// The granule it has to be a multiple of, in elements.
        quantum: u64,
    },
    /// No such element in the unit.
    #[error(
        "parameter {param} element {element} is outside the unit: {params} parameters, this one of {numel} elements"
    )]
    NoSuchElement {
        /// Index of the parameter, in the order given to the layout.
        param: usize,
        /// Element asked for.
        element: u64,
        /// Parameters in the unit.
        params: usize,
        /// Elements of that parameter; 0 when there is no such parameter.
        numel: u64,
    },
    /// The parameter carries no optimizer state.
    #[error(
        "parameter {param} is frozen; only trainable parameters have a place in the trainable shards"
    )]
    Frozen {
        /// Index of the parameter, in the order given to the layout.
        param: usize,
    },
}

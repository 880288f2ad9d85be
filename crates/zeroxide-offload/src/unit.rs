//! One unit: its layout, where its blocks are, its gradients and what each parameter has seen.

use zeroxide_layout::{Component, ParamShape, Tiling, UnitLayout};
use zeroxide_memory::Lease;
use zeroxide_optim::Land;

use crate::weights::Weights;

/// What the optimizer knows of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct ParamState {
    pub(crate) trainable: bool,
    /// Index into the groups that a step is given.
    pub(crate) group: usize,
    /// Updates made so far; the exponent of the bias correction.
    pub(crate) updates: u64,
    /// A gradient has arrived since the last step.
    pub(crate) landed: bool,
    /// A gradient is arriving in parts: the next element expected, and what landing does with each part.
    pub(crate) arriving: Option<(u64, Land)>,
    /// Sum of squares of the gradient kept, as of its last arrival with `norm`.
    pub(crate) sum_squares: f64,
    /// The gradient kept holds an infinity or a NaN.
    pub(crate) nonfinite: bool,
}

/// Optimizer state blocks.
pub(crate) enum StateBlocks {
    /// Every parameter is frozen: there is none.
    None,
    /// In host memory: one lease a component other than the weight.
    Host {
        /// (component, its bytes), in the order of [`StateLayout::components`](zeroxide_layout::StateLayout).
        blocks: Vec<(Component, Lease)>,
    },
    /// On disk.
    Disk {
        /// The moments have never been written: they are zero and need not be read.
        moments_are_zero: bool,
    },
}

pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) layout: UnitLayout,
    /// Tiles of the weight block: all elements.
    pub(crate) weight_tiles: Tiling,
    /// Tiles of the state blocks: the trainable elements.
    pub(crate) state_tiles: Tiling,
    pub(crate) weights: Weights,
    pub(crate) state: StateBlocks,
    /// Gradients of the trainable elements, in the gradient dtype. `None` where the caller lends them.
    pub(crate) grad: Option<Lease>,
    pub(crate) params: Vec<ParamState>,
}

impl Unit {
    pub(crate) fn param_states(shapes: &[ParamShape]) -> Vec<ParamState> {
        shapes
            .iter()
            .map(|shape| ParamState {
                trainable: shape.trainable,
                group: 0,
                updates: 0,
                landed: false,
                arriving: None,
                sum_squares: 0.0,
                nonfinite: false,
            })
            .collect()
    }
}

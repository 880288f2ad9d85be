//! One unit: its layout, where its blocks are, its gradients and what each parameter has seen.

use std::ops::Range;

use zeroxide_layout::{ParamShape, Role, StateKey, StateLayout, StateTensor, Tiling, UnitLayout};
use zeroxide_memory::Lease;
use zeroxide_optim::{Accumulate, AccumulateStats};

use crate::error::{Result, misuse};
use crate::gradients::kept::KeptGradients;
use crate::settings::MeshPosition;
use crate::weights::residence::UnitWeights;

/// Where the gradient of one parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gradient {
    /// None has arrived since the last step.
    Missing,
    /// In the unit's outgoing buffer: other ranks have not got it yet. Beside it may lie what was kept before.
    Outgoing,
    /// In the gradients kept, or on its way there.
    Kept,
}

/// What the optimizer knows of one parameter.
#[derive(Clone, Debug)]
pub(crate) struct ParamState {
    pub(crate) trainable: bool,
    /// Its random bits, for a format that rounds.
    pub(crate) stream: u64,
    /// Index into the groups that a step is given.
    pub(crate) group: usize,
    /// Updates made so far; the exponent of the bias correction.
    pub(crate) updates: u64,
    /// Of the last steps, those that it has yet to make up for, each with a gradient of zero.
    pub(crate) missed: u64,
    pub(crate) gradient: Gradient,
    /// A gradient is arriving in parts: the next element expected, and what accumulation does with each part.
    pub(crate) arriving: Option<(u64, Accumulate)>,
    /// Sum of squares of the gradient kept, as of its last arrival with `norm`, and whether it holds an infinity or a NaN.
    pub(crate) norm: AccumulateStats,
}

/// Optimizer state blocks.
pub(crate) enum StateBlocks {
    /// Every parameter is frozen: there is none.
    None,
    /// In host memory.
    Host {
        /// (state tensor, its bytes), in the order of [`StateLayout::state`].
        blocks: Vec<(StateKey, Lease)>,
    },
    /// On the device that computes, with weights and gradients: the caller has them.
    Away,
    /// On disk.
    Disk {
        /// The moments have never been written: they have their initial values and need not be read.
        pristine: bool,
    },
}

pub(crate) struct Unit {
    pub(crate) name: String,
    /// This process among those that train it.
    pub(crate) mesh: MeshPosition,
    pub(crate) layout: UnitLayout,
    /// The optimizer rule that updates its trainable parameters.
    pub(crate) rule: &'static str,
    /// The state tensors that rule and format give each of them.
    pub(crate) tensors: StateLayout,
    /// Where in the layout this rank's weights, gradients and state start. Tiles and blocks count from there.
    pub(crate) base: u64,
    /// Tiles of this rank's weights.
    pub(crate) weight_tiles: Tiling,
    /// Tiles of this rank's state: its trainable elements.
    pub(crate) state_tiles: Tiling,
    pub(crate) weights: UnitWeights,
    pub(crate) state: StateBlocks,
    /// Gradients of this rank's trainable elements, in the gradient dtype.
    pub(crate) grad: KeptGradients,
    /// Gradients of all trainable elements on their way to the ranks that keep them, in the dtype they travel in.
    pub(crate) outgoing: Option<Lease>,
    /// Where the other ranks' gradients of what this rank keeps arrive, rank after rank, while the caller carries them.
    pub(crate) incoming: Option<Lease>,
    /// Nothing has been reduced into `grad` since the last step.
    pub(crate) fresh: bool,
    /// Steps without a gradient are made up for when the unit is next used.
    pub(crate) lazy: bool,
    pub(crate) params: Vec<ParamState>,
}

impl StateBlocks {
    /// Whether the moments are what they were at the beginning, and nowhere written.
    pub(crate) fn is_pristine(&self) -> bool {
        matches!(self, Self::Disk { pristine: true })
    }
}

impl Unit {
    /// A state tensor that the unit has.
    pub(crate) fn tensor(&self, key: StateKey) -> &StateTensor {
        let found = self.tensors.find(key.name());
        found.expect("keys come from the unit's own layout")
    }

    /// Bytes of all state tensors of one of the tiles that an update takes.
    pub(crate) fn tile_bytes(&self, tile: u32) -> u64 {
        let elements = self.state_tiles.range(tile);
        self.tensors.bytes(elements.end - elements.start)
    }

    /// The number that gradients have among the tensors of a tile: the one after those of the layout.
    pub(crate) fn gradient_number(&self) -> usize {
        self.tensors.tensors().len()
    }

    /// Tiles of the block of a state tensor.
    pub(crate) fn tiles_of(&self, key: StateKey) -> Tiling {
        if key == StateKey::WEIGHT {
            self.weight_tiles
        } else {
            self.state_tiles
        }
    }

    /// The state tensor called `name`.
    pub(crate) fn state_key(&self, call: &'static str, name: &str) -> Result<StateKey> {
        match self.tensors.find(name) {
            Some(tensor) if tensor.role != Role::Exact => Ok(tensor.key),
            _ => {
                let known: Vec<&str> = self
                    .tensors
                    .tensors()
                    .iter()
                    .filter(|tensor| tensor.role != Role::Exact)
                    .map(|tensor| tensor.key.name())
                    .collect();
                misuse(
                    call,
                    format!(
                        "unit {} has no state {name:?}: its optimizer is {}, which has {}",
                        self.name,
                        self.rule,
                        known.join(", ")
                    ),
                )
            }
        }
    }

    /// The range of the layout that `range` of this rank's shard is.
    pub(crate) fn flat(&self, range: &Range<u64>) -> Range<u64> {
        self.base + range.start..self.base + range.end
    }

    /// The elements of the layout that this rank keeps at home.
    pub(crate) fn own(&self) -> Range<u64> {
        self.flat(&(0..self.weight_tiles.len()))
    }

    /// Those whose gradient and optimizer state this rank keeps.
    pub(crate) fn kept(&self) -> Range<u64> {
        self.flat(&(0..self.state_tiles.len()))
    }

    /// Those of which this rank sums what all ranks have sent.
    pub(crate) fn summed(&self) -> Range<u64> {
        if self.mesh.sums_its_slice() {
            self.layout.trainable_shard(self.mesh.slice())
        } else {
            self.kept()
        }
    }

    /// `streams`: of each parameter, or none at all.
    pub(crate) fn param_states(shapes: &[ParamShape], streams: &[u64]) -> Vec<ParamState> {
        shapes
            .iter()
            .enumerate()
            .map(|(index, shape)| ParamState {
                trainable: shape.trainable,
                stream: streams.get(index).copied().unwrap_or_default(),
                group: 0,
                updates: 0,
                missed: 0,
                gradient: Gradient::Missing,
                arriving: None,
                norm: AccumulateStats::default(),
            })
            .collect()
    }
}

impl ParamState {
    /// Whether the parameter has had a gradient since the last step.
    pub(crate) fn has_gradient(&self) -> bool {
        self.gradient != Gradient::Missing
    }

    /// Whether a gradient lies where the next one arrives: in the unit's outgoing buffer if `away`, else in the one kept.
    pub(crate) fn has_arrived(&self, away: bool) -> bool {
        if away {
            self.gradient == Gradient::Outgoing
        } else {
            self.has_gradient()
        }
    }

    /// A gradient has arrived whole.
    pub(crate) fn arrived(&mut self, away: bool) {
        self.arriving = None;
        self.gradient = if away {
            Gradient::Outgoing
        } else {
            Gradient::Kept
        };
    }

    /// What was in the outgoing buffer has left for the ranks that keep it.
    pub(crate) fn left(&mut self) {
        self.arriving = None;
        if self.gradient == Gradient::Outgoing {
            self.gradient = Gradient::Kept;
        }
    }

    /// There is no gradient any more.
    pub(crate) fn forget_gradient(&mut self) {
        self.arriving = None;
        self.gradient = Gradient::Missing;
        self.norm = AccumulateStats::default();
    }
}

//! One unit: its shape as the caller knows it, and the part of it that this rank keeps.

use zeroxide_layout::{Dtype, FRAME, PAGE, ParamShape, Role, STATE_BLOCK, StateLayout, UnitLayout};

use crate::error::{PlanError, Result};
use crate::home::{GradientHome, StateHome, WeightHome};
use crate::mesh::Mesh;

/// Tiles of units that never touch the disk are this many times longer: there is nothing to overlap with.
const HOST_TILE_FACTOR: u64 = 8;

/// Most state tensors that a parameter has beside its live weight.
const MOST_TENSORS: usize = 4;

/// Bytes of the optimizer state of a block of [`STATE_BLOCK`] trainable elements, the live weight not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Of each state tensor in the order of the layout; 0 where there are no more.
    pub each: [u64; MOST_TENSORS],
    /// Of those that hold the bits of the master weight that the live weight lacks; filled together with the weight.
    pub master: u64,
    /// Of the largest tensor, where each of those that are filled with the weight counts with the others of them.
    pub largest: u64,
    /// Of those that are written before the first update: with the weight, or since they do not start at zero.
    pub written: u64,
}

impl StateBytes {
    /// The bytes of a state layout.
    ///
    /// # Panics
    /// If it has more than four tensors beside the live weight.
    pub fn of(layout: &StateLayout) -> Self {
        let mut found = Self::default();
        for (index, tensor) in layout.state().iter().enumerate() {
            let bytes = tensor.bytes(STATE_BLOCK as u64);
            found.each[index] = bytes;
            if tensor.role == Role::Exact {
                found.master += bytes;
            } else {
                found.largest = found.largest.max(bytes);
            }
            if tensor.role == Role::Exact || tensor.initial != 0.0 {
                found.written += bytes;
            }
        }
        found.largest = found.largest.max(found.master);
        found
    }

    /// Of all state tensors.
    pub fn total(&self) -> u64 {
        self.each.iter().sum()
    }

    /// Bytes of all state tensors of that many elements, whole blocks, each tensor in whole pages.
    pub fn paged(&self, elements: u64) -> u64 {
        self.each.iter().map(|bytes| pages(elements, *bytes)).sum()
    }
}

/// Bytes of that many elements, whole blocks of so many bytes each, in whole pages.
fn pages(elements: u64, block: u64) -> u64 {
    (elements / STATE_BLOCK as u64 * block).next_multiple_of(PAGE as u64)
}

/// One unit, as the caller describes it.
#[derive(Clone, Debug)]
pub struct UnitShape {
    /// Name for messages.
    pub name: String,
    /// Its parameters, in the caller's order.
    pub params: Vec<ParamShape>,
    /// Its gradients come all through backward, not one after the other within a short time.
    pub held_through_backward: bool,
    /// Home of the weights.
    pub weights: WeightHome,
    /// Home of the optimizer state.
    pub state: StateHome,
    /// Home of its gradients. Where its optimizer state is not on disk, they are not there either, but in host memory.
    pub gradients: GradientHome,
    /// Bytes of its optimizer state.
    pub state_bytes: StateBytes,
    /// This rank among those that train it; `None` where these are all ranks.
    pub mesh: Option<Mesh>,
}

/// The part of a unit that a rank keeps, in elements of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalShard {
    /// Where it starts in the layout.
    pub base: u64,
    /// Weights.
    pub own: u64,
    /// Gradients and optimizer state.
    pub kept: u64,
}

impl LocalShard {
    /// The part of a unit with this layout and home that the rank at `mesh` keeps.
    pub fn new(mesh: Mesh, weights: WeightHome, layout: &UnitLayout) -> Self {
        if mesh.shards == 1 || weights == WeightHome::Borrowed {
            return Self {
                base: 0,
                own: layout.len(),
                kept: layout.trainable_len(),
            };
        }
        // Layouts are padded for the whole world, so any number of shards that divides it cuts equal slices.
        let own = layout.len() / u64::from(mesh.shards);
        Self {
            base: own * u64::from(mesh.shard()),
            own,
            kept: if layout.trainable_len() > 0 { own } else { 0 },
        }
    }
}

/// One unit with its layout over the world and what this rank keeps of it.
#[derive(Clone, Debug)]
pub struct PlacedUnit {
    /// As the caller described it.
    pub shape: UnitShape,
    /// Its flat layout, padded for all ranks.
    pub layout: UnitLayout,
    /// What this rank keeps.
    pub local: LocalShard,
    /// Elements in a tile of it, a multiple of 2,048.
    pub tile: u64,
    /// This rank among those that train it.
    pub mesh: Mesh,
}

impl PlacedUnit {
    /// Lays the unit out; over the ranks of `all` where it does not say over which.
    pub(crate) fn new(all: Mesh, tile_elements: u64, shape: UnitShape) -> Result<Self> {
        let mesh = shape.mesh.unwrap_or(all);
        let layout = UnitLayout::new(&shape.params, mesh.world())?;
        let trainable = layout.trainable_len();
        if all.world() > 1 && trainable > 0 && trainable < layout.len() {
            return Err(PlanError::MixedUnit { unit: shape.name });
        }
        let local = LocalShard::new(mesh, shape.weights, &layout);
        let mut made = Self {
            shape,
            layout,
            local,
            tile: tile_elements,
            mesh,
        };
        made.choose_tile(tile_elements);
        Ok(made)
    }

    /// Sets the length of its tiles, `tile_elements` where any of its blocks is on disk.
    pub(crate) fn choose_tile(&mut self, tile_elements: u64) {
        self.tile = if self.touches_disk() {
            tile_elements
        } else {
            tile_elements.saturating_mul(HOST_TILE_FACTOR)
        };
    }

    /// Whether this rank keeps optimizer state of the unit on disk.
    pub fn state_on_disk(&self) -> bool {
        self.shape.state == StateHome::Disk && self.local.kept > 0
    }

    /// Whether its gradients wait on disk for the step.
    pub fn spills(&self) -> bool {
        self.shape.gradients == GradientHome::Disk
            && self.shape.weights != WeightHome::Borrowed
            && self.state_on_disk()
    }

    /// Whether its gradients are in memory only until its update, which begins inside of backward.
    pub fn consumes(&self) -> bool {
        self.shape.gradients == GradientHome::Consumed
            && self.shape.weights != WeightHome::Borrowed
            && !self.is_away()
            && self.local.kept > 0
    }

    /// Whether its gradients take turns in room that units share, or have such room while they come.
    pub fn in_rooms(&self) -> bool {
        self.spills() || self.consumes()
    }

    /// Whether all of the unit is at home on the device that computes.
    pub fn is_away(&self) -> bool {
        self.shape.state == StateHome::Device && self.local.kept > 0
    }

    /// Bytes of its optimizer state in memory, each tensor in whole pages.
    pub fn state_bytes(&self) -> u64 {
        self.shape.state_bytes.paged(self.local.kept)
    }

    /// Bytes of the tiles of its optimizer state on disk, each tile of a tensor in whole pages.
    pub(crate) fn state_tile_bytes(&self) -> u64 {
        let each = self.shape.state_bytes.each.iter();
        each.map(|block| self.tiled(*block)).sum()
    }

    /// Bytes of the tiles of a tensor that has so many bytes a block, each in whole pages.
    pub(crate) fn tiled(&self, block: u64) -> u64 {
        let (tiles, rest) = (self.local.kept / self.tile, self.local.kept % self.tile);
        tiles * pages(self.tile, block) + pages(rest, block)
    }

    /// Whether any block of the unit is at home on disk.
    pub fn touches_disk(&self) -> bool {
        self.shape.weights == WeightHome::Disk || self.state_on_disk()
    }

    /// Bytes of all its weights.
    pub fn weight_bytes(&self, compute: Dtype) -> u64 {
        self.layout.len() * compute.size() as u64
    }

    /// Frames that its window needs, where its weights move.
    pub fn frames(&self, compute: Dtype) -> u64 {
        self.weight_bytes(compute).div_ceil(FRAME as u64)
    }

    /// Bytes of its gradients on their way between ranks: those of all trainable elements.
    pub fn outgoing_bytes(&self, comm: Dtype) -> u64 {
        self.layout.trainable_len() * comm.size() as u64
    }

    /// Bytes of the other ranks' gradients of what this rank keeps of it.
    pub fn incoming_bytes(&self, comm: Dtype) -> u64 {
        self.mesh.incoming_bytes(self.local.kept, comm)
    }

    /// Bytes of this rank's part of its weights.
    pub(crate) fn own_bytes(&self, compute: Dtype) -> u64 {
        self.local.own * compute.size() as u64
    }

    /// Bytes of gradients that this rank keeps for the step, wherever they are.
    pub(crate) fn gradient_bytes(&self, grad: Dtype) -> u64 {
        match self.shape.weights {
            WeightHome::Borrowed => 0,
            _ if self.is_away() => 0,
            _ => self.local.kept * grad.size() as u64,
        }
    }

    /// Bytes of optimizer state at home in host memory.
    pub(crate) fn optimizer_bytes(&self) -> u64 {
        match self.shape.state {
            StateHome::Host => self.state_bytes(),
            StateHome::Disk | StateHome::Device => 0,
        }
    }

    /// Bytes of its blocks at home on disk.
    pub(crate) fn disk_bytes(&self, compute: Dtype, grad: Dtype) -> u64 {
        let weights = match self.shape.weights {
            WeightHome::Disk => self.own_bytes(compute),
            _ => 0,
        };
        let state = match self.shape.state {
            StateHome::Disk => self.state_tile_bytes(),
            StateHome::Host | StateHome::Device => 0,
        };
        weights + state + self.gradients_on_disk(grad)
    }

    /// Bytes of its gradients that are at home on disk.
    pub(crate) fn gradients_on_disk(&self, grad: Dtype) -> u64 {
        if self.spills() {
            self.gradient_bytes(grad)
        } else {
            0
        }
    }

    /// Bytes of all its blocks that are not on the device: what a commit of a durable run holds.
    pub(crate) fn durable_bytes(&self, compute: Dtype) -> u64 {
        match (self.is_away(), self.shape.weights) {
            (true, _) | (_, WeightHome::Borrowed) => 0,
            _ => self.own_bytes(compute) + self.state_bytes(),
        }
    }
}

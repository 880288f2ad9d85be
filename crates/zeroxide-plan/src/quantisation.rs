//! What travels between ranks as block-wise integers instead of as it is, and the memory that this takes.
//!
//! `ZeRO++` (Wang et al. 2023): weights as int8, gradients as int4, and both in two hops where ranks stand in groups:
//! between groups, where a byte costs most, each value crosses once. `near` ranks in a row are a group, and ranks with the
//! same place in theirs are *far* from one another. A message has a scale of two bytes for each [`BLOCK`] of elements.

use crate::mesh::Mesh;

/// Elements that share a scale.
pub const BLOCK: u64 = 256;
/// Bytes of a scale, bf16.
const SCALE: u64 = 2;

/// What is sent as integers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quantisation {
    /// Ranks in a row that are a group; 0 where all are one. Has no meaning where shard groups are the groups.
    pub near: u32,
    /// Of each unit, whether its weights travel as int8; empty where none do.
    pub weights: Vec<bool>,
    /// Gradients travel as int4.
    pub gradients: bool,
    /// What quantising has changed in gradients is kept, and added to the next ones.
    pub feedback: bool,
}

impl Quantisation {
    /// Whether the weights of a unit travel as int8.
    pub fn quantises(&self, unit: usize) -> bool {
        self.weights.get(unit).copied().unwrap_or(false)
    }

    /// Ranks of a group.
    pub const fn near(&self, mesh: Mesh) -> u32 {
        if mesh.shards > 1 && mesh.replicas > 1 {
            mesh.shards
        } else if self.near == 0 {
            mesh.world()
        } else {
            self.near
        }
    }

    /// Ranks with the same place, one in each group: between them gradients take their second hop.
    pub const fn far(&self, mesh: Mesh) -> u32 {
        mesh.world() / self.near(mesh)
    }

    /// Groups over which a shard group stretches: parts of each unit of which a rank keeps codes for its own group.
    pub const fn far_shards(&self, mesh: Mesh) -> u32 {
        mesh.shards.div_ceil(self.near(mesh))
    }

    /// Bytes of the codes that a rank keeps of a unit of `len` elements in its layout.
    pub const fn code_bytes(&self, mesh: Mesh, len: u64) -> u64 {
        weight_message(len / mesh.shards as u64) * self.far_shards(mesh) as u64
    }

    /// Bytes of what a rank keeps for the next gradients of a unit of `len` trainable elements, in bf16: of every slice that
    /// another rank sums.
    pub const fn residual_bytes(&self, mesh: Mesh, len: u64) -> u64 {
        if self.feedback {
            len / mesh.world() as u64 * (mesh.world() as u64 - 1) * 2
        } else {
            0
        }
    }

    /// Bytes that reducing a unit of `len` trainable elements takes beside what leaves: fp32 sums of a slice for each
    /// group, and the messages of both hops.
    pub const fn incoming_bytes(&self, mesh: Mesh, len: u64) -> u64 {
        let slice = len / mesh.world() as u64;
        let sums = slice * 4 * self.far(mesh) as u64;
        sums + gradient_message(slice) * (mesh.world() as u64 - 1)
    }
}

/// Bytes of a message of weights: a code of one byte for each element, and the scales.
pub const fn weight_message(elements: u64) -> u64 {
    elements + elements / BLOCK * SCALE
}

/// Bytes of a message of gradients: half a byte for each element, and the scales.
pub const fn gradient_message(elements: u64) -> u64 {
    elements / 2 + elements / BLOCK * SCALE
}

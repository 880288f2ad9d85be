//! A rank's place in the two groups that a unit knows.

use zeroxide_layout::Dtype;

/// The ranks that train one model, as a unit sees them: `shards` ranks in a row divide it among themselves, and `replicas`
/// such groups each hold all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Number of this process, below [`world`](Self::world).
    pub rank: u32,
    /// Ranks that divide gradients and optimizer state, and weights where these are sharded.
    pub shards: u32,
    /// Groups that hold the same shards.
    pub replicas: u32,
}

impl Mesh {
    /// The only process.
    pub const ALONE: Self = Self {
        rank: 0,
        shards: 1,
        replicas: 1,
    };

    /// All ranks. Layouts are padded for all of them, so that every division into groups has the same layout.
    pub const fn world(self) -> u32 {
        self.shards * self.replicas
    }

    /// Which of the equal slices of a unit this rank keeps, below `shards`.
    pub const fn shard(self) -> u32 {
        self.rank % self.shards
    }

    /// Bytes of the other ranks' gradients of `kept` elements, which arrive as `comm`.
    pub const fn incoming_bytes(self, kept: u64, comm: Dtype) -> u64 {
        kept * comm.size() as u64 * (self.world() as u64 - 1)
    }

    /// Whether every rank keeps all gradients and optimizer state.
    pub const fn replicated(self) -> bool {
        self.shards == 1 && self.replicas > 1
    }
}

//! A rank's place in the two groups that a unit knows.

use zeroxide_layout::Dtype;

/// The ranks that train one model, as a unit sees them: `shards` ranks in a row, its shard group, divide it among
/// themselves, and `replicas` such groups each hold all of it. The ranks that hold the same shard are its replicate group.
///
/// Layouts are cut into one *slice* for each rank of all groups. A shard is as many slices in a row as there are replicas,
/// and each replica answers for one of them: it takes that slice's part of a norm, saves it, and sums its gradients where
/// the caller carries them. So the same sums are taken over the same elements however the ranks are grouped.
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

    /// Position in the replicate group, below `replicas`.
    pub const fn replica(self) -> u32 {
        self.rank / self.shards
    }

    /// Which slice of every unit this rank answers for, below [`world`](Self::world).
    pub const fn slice(self) -> u32 {
        self.shard() * self.replicas + self.replica()
    }

    /// Whether this rank keeps every element at home: nobody has to bring it a part.
    pub const fn has_all(self) -> bool {
        self.shards == 1
    }

    /// Elements of which this rank sums what all ranks send through the caller, where it keeps the gradients of `kept`:
    /// its slice. Where every rank keeps all gradients each sums them all, and none has to send on what it has summed.
    pub const fn summed(self, kept: u64) -> u64 {
        if self.has_all() {
            kept
        } else {
            kept / self.replicas as u64
        }
    }

    /// Bytes of the other ranks' gradients, which arrive as `comm`, where this rank keeps those of `kept` elements.
    pub const fn incoming_bytes(self, kept: u64, comm: Dtype) -> u64 {
        self.summed(kept) * comm.size() as u64 * (self.world() as u64 - 1)
    }

    /// Whether every rank keeps all gradients and optimizer state.
    pub const fn replicated(self) -> bool {
        self.shards == 1 && self.replicas > 1
    }
}

//! What one collective is, and when it begins.

/// The part of a step in which a collective begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Forward.
    Forward,
    /// Backward.
    Backward,
    /// The optimizer step.
    Step,
}

impl Phase {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Step => "step",
        }
    }
}

/// What is exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CollectiveKind {
    /// Every rank gets the whole weights of a unit.
    AllGather,
    /// Groups of ranks get the codes of one another's weights of a unit.
    AllGatherAcross,
    /// Every rank gets all ranks' gradients of a unit.
    AllGatherGradients,
    /// Every rank gets all ranks' gradients of what it sums of a unit.
    AllToAll,
    /// Every rank gets, from those with its place in other groups, what their groups have summed of what it sums.
    AllToAllAcross,
    /// Every rank gets from the other replicas of its shard what they have summed.
    AllGatherSums,
}

impl CollectiveKind {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllGather => "all-gather",
            Self::AllGatherAcross => "all-gather across groups",
            Self::AllGatherGradients => "all-gather of gradients",
            Self::AllToAll => "all-to-all",
            Self::AllToAllAcross => "all-to-all across groups",
            Self::AllGatherSums => "all-gather of sums",
        }
    }
}

/// One collective of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collective {
    /// When it begins.
    pub phase: Phase,
    /// What it does.
    pub kind: CollectiveKind,
    /// Index of the unit.
    pub unit: usize,
    /// Bytes that leave the rank for others.
    pub sent: u64,
    /// Those of them that leave its group: its shard group, or where integers travel in two hops the ranks near it.
    pub across: u64,
}

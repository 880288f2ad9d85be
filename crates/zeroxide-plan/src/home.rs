//! Where blocks are at home, and what carries gradients.

/// Where the live weights of a unit are at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightHome {
    /// Always under the unit's window, in host memory.
    Host,
    /// On disk; under the window only while the unit is gathered.
    Disk,
    /// This rank's shard in host memory; the whole under the window only while the unit is gathered.
    Shard,
    /// In memory that belongs to the caller and is lent for the time of a step.
    Borrowed,
}

impl WeightHome {
    /// Whether the weights are under their window only while the unit is gathered.
    pub const fn moves(self) -> bool {
        matches!(self, Self::Disk | Self::Shard)
    }

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Shard => "shard",
            Self::Borrowed => "borrowed",
        }
    }
}

/// Where the optimizer state of a unit is at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateHome {
    /// In host memory.
    Host,
    /// On disk; in the staging ring only while its tile is updated.
    Disk,
    /// On the device that computes, and with it the unit's weights and gradients: the core keeps no byte of the unit, and
    /// the caller updates it.
    Device,
}

impl StateHome {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Device => "device",
        }
    }
}

/// Where the gradients of a unit wait for the optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradientHome {
    /// In host memory.
    Host,
    /// On disk, in the dtype in which they are kept; in memory while they are accumulated.
    Disk,
    /// Nowhere: backward updates a unit as soon as its gradients are complete, and until then they are in host memory.
    Consumed,
}

impl GradientHome {
    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Consumed => "consumed",
        }
    }
}

/// How gradients reach the ranks that keep them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Through memory that the ranks of one host share. Weights at home in host memory are then one copy for all of them,
    /// unless the state is replicated.
    Shared,
    /// Carried by the caller's collectives.
    Collective,
}

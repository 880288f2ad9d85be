//! What cannot be planned.

use thiserror::Error;
use zeroxide_layout::LayoutError;

use crate::buckets::{Buckets, Mib};
use crate::device::DeviceBuckets;
use crate::mesh::Mesh;

/// Result of planning.
pub type Result<T> = std::result::Result<T, PlanError>;

/// A plan that cannot be made. The texts name the config keys that users set.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A unit has no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// What no machine will have.
    #[error("{what}: {got} is more than can be planned: expected at most {most}")]
    BeyondLimit {
        /// What was asked for too much of.
        what: &'static str,
        /// How much.
        got: u64,
        /// The limit.
        most: u64,
    },
    /// A rank that is not in its groups.
    #[error(
        "rank {} of {} shards x {} replicas: expected groups of at least 1 rank, and a rank below their product",
        _0.rank, _0.shards, _0.replicas
    )]
    NoSuchRank(Mesh),
    /// A shard of such a unit would not be one slice of each of its blocks.
    #[error(
        "unit {unit} has trainable and frozen parameters; with several ranks they are units of their own"
    )]
    MixedUnit {
        /// Name of the unit.
        unit: String,
    },
    /// The staging ring cannot hold one tile that is updated and one that moves.
    #[error(
        "zeroxide.staging_bytes is {limit}: the ring needs {need} bytes, two tiles of {tile}; raise it or lower \
         zeroxide.tile_bytes"
    )]
    Staging {
        /// Bytes needed.
        need: u64,
        /// Bytes given.
        limit: u64,
        /// Bytes of one tile of all components.
        tile: u64,
    },
    /// The budget cannot hold what every step needs.
    #[error(
        "host_memory {} MiB is too small by {} MiB: the process already uses {} and the state needs {} ({buckets}), \
         before any activation; to help: {}",
        Mib(*limit), Mib(need - limit), Mib(*resident), Mib(buckets.total()), help(buckets.largest(), *pinned)
    )]
    OverBudget {
        /// Bytes needed: `resident` and all buckets.
        need: u64,
        /// The budget, in bytes.
        limit: u64,
        /// Bytes that the process uses already.
        resident: u64,
        /// What the state needs.
        buckets: Buckets,
        /// Optimizer state that could be on disk stays in host memory.
        pinned: bool,
    },
    /// The budget holds every step, but not what filling the state takes before the first one.
    #[error(
        "host_memory {} MiB is too small by {} MiB while the engine is made: the process already uses {}, the state \
         needs {} ({buckets}), and the initial values of the largest unit {} beside the staging ring; to help: raise \
         host_memory by that much, or lower zeroxide.unit_bytes if no single parameter is as large",
        Mib(*limit), Mib(need - limit), Mib(*resident), Mib(buckets.total()), Mib(*filling)
    )]
    OverBudgetFilling {
        /// Bytes needed: `resident`, all buckets and `filling`.
        need: u64,
        /// The budget, in bytes.
        limit: u64,
        /// Bytes that the process uses already.
        resident: u64,
        /// What the state needs.
        buckets: Buckets,
        /// Bytes that filling the largest unit takes beside them.
        filling: u64,
    },
    /// The budget of the device cannot hold what is to be there.
    #[error(
        "zeroxide.device_memory {} MiB is too small by {} MiB: the device is to have {} ({buckets}), before any \
         activation; to help: raise it, or {}",
        Mib(*limit), Mib(buckets.total() - limit), Mib(buckets.total()), device_help(buckets)
    )]
    OverDeviceBudget {
        /// The budget, in bytes.
        limit: u64,
        /// What is to be on the device.
        buckets: DeviceBuckets,
    },
}

impl PlanError {
    /// (bytes needed, bytes allowed, the bucket to look at) of a refusal for lack of memory.
    pub fn shortage(&self) -> Option<(u64, u64, &'static str)> {
        match self {
            Self::Layout(_)
            | Self::BeyondLimit { .. }
            | Self::NoSuchRank(_)
            | Self::MixedUnit { .. } => None,
            Self::Staging { need, limit, .. } | Self::OverBudgetFilling { need, limit, .. } => {
                Some((*need, *limit, "staging"))
            }
            Self::OverBudget {
                need,
                limit,
                buckets,
                ..
            } => Some((*need, *limit, buckets.largest())),
            Self::OverDeviceBudget { limit, buckets } => Some((buckets.total(), *limit, "device")),
        }
    }
}

/// What makes a bucket smaller.
fn help(bucket: &str, pinned: bool) -> &'static str {
    match bucket {
        "optimizer" if pinned => "lower zeroxide.state_in_memory",
        "weights" => "offload parameters to nvme",
        "optimizer" => "offload the optimizer to nvme",
        "gradients" => {
            "offload the optimizer to nvme, where gradients can wait too (zeroxide.gradients), keep them in bf16 \
             (data_types.grad_accum_dtype), or train fewer parameters"
        }
        "gathered" => "lower zeroxide.unit_bytes or zeroxide.prefetch",
        _ => "lower zeroxide.staging_bytes",
    }
}

/// What leaves more of a device free.
fn device_help(buckets: &DeviceBuckets) -> &'static str {
    if buckets.optimizer > 0 {
        "have the CPU update more, with a larger zero_optimization.offload_optimizer.ratio"
    } else {
        "let weights leave the device with zero_optimization.stage 3 and offload_param"
    }
}

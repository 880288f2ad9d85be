//! What can go wrong between the tiers.

use thiserror::Error;
use zeroxide_exchange::ExchangeError;
use zeroxide_layout::LayoutError;
use zeroxide_memory::{Forked, MemoryError};
use zeroxide_optim::OptimError;
use zeroxide_plan::PlanError;
use zeroxide_storage::StorageError;

/// Failures of the offload layer. Storage and memory errors pass through with all they carry.
#[derive(Debug, Error)]
pub enum OffloadError {
    /// A disk operation or a checksum failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A budget, a mapping or a fork stood in the way.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The worker threads could not be had.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// The exchange with the other ranks failed or was cancelled.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The shapes do not make a layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Every frame is held by units that are in use.
    #[error(
        "unit {unit} needs {need} bytes of gathered memory; {held} of {capacity} are held by units in use: \
         raise the memory for gathered units or split the unit"
    )]
    NoFrames {
        /// The unit to be gathered.
        unit: String,
        /// Bytes it takes.
        need: u64,
        /// Bytes that units in use hold.
        held: u64,
        /// Bytes there are.
        capacity: u64,
    },
    /// An earlier step failed half way: some tiles hold the new state, some the old one.
    #[error(
        "optimizer step {step} failed half way and its state is mixed; resume from the last checkpoint ({cause})"
    )]
    Poisoned {
        /// The step that failed.
        step: u64,
        /// The error it failed with.
        cause: String,
    },
    /// The same, where the step failed on the device that computes, or in what followed it there.
    #[error(
        "optimizer step {step} failed half way on the device and its state is mixed; resume from the last checkpoint \
         ({cause})"
    )]
    PoisonedAway {
        /// The step that failed.
        step: u64,
        /// The error it failed with.
        cause: String,
    },
    /// A view of a unit's weights was read after they were let go, and they could not be brought.
    #[error(
        "weights of {unit} were read while they were not gathered, and could not be brought: {cause}; keep a copy of what \
         is used outside of its module, or use it inside GatheredParameters"
    )]
    Stray {
        /// The unit.
        unit: String,
        /// Why.
        cause: String,
    },
    /// What was computed since is wrong.
    #[error("{line}; what this pass computed is not to be used: engine.zero_grad() forgets it")]
    Strayed {
        /// What happened.
        line: String,
    },
    /// A gradient that an update inside of backward must not use.
    #[error(
        "a gradient of {unit} is not finite, and zeroxide.update_in_backward has no step to leave out: {updated} units \
         are updated already; lower the learning rate, or set it to false, where such a step is skipped"
    )]
    NotFinite {
        /// The unit.
        unit: String,
        /// Units whose update has begun.
        updated: usize,
    },
    /// A unit is used whose update has begun inside of the backward that uses it.
    #[error(
        "{call}: {unit} is used after backward began to update it (zeroxide.update_in_backward), when its gradients were \
         complete: call engine.step() first, or set it to false where backward itself comes to the unit again"
    )]
    UpdatedEarly {
        /// The call refused.
        call: &'static str,
        /// The unit.
        unit: String,
    },
    /// A step is half made: its updates began inside of backward.
    #[error(
        "{call}: backward has begun to update the weights (zeroxide.update_in_backward), and the step that ends it has \
         not been made: call engine.step() first"
    )]
    InsideStep {
        /// The call refused.
        call: &'static str,
    },
    /// Hyperparameters have changed between the updates of one step.
    #[error(
        "a hyperparameter has changed since backward began to update with it (zeroxide.update_in_backward): set it back, \
         and change it after engine.step() and before the next backward"
    )]
    OtherConstants,
    /// A call that the present state does not allow: a mistake in the caller's code.
    #[error("{call}: {what}")]
    Misuse {
        /// The call refused.
        call: &'static str,
        /// Why.
        what: String,
    },
}

impl From<Forked> for OffloadError {
    fn from(error: Forked) -> Self {
        Self::Memory(error.into())
    }
}

/// Short form of every result here.
pub type Result<T> = std::result::Result<T, OffloadError>;

pub(crate) fn misuse<T>(call: &'static str, what: impl Into<String>) -> Result<T> {
    Err(OffloadError::Misuse {
        call,
        what: what.into(),
    })
}

impl From<PlanError> for OffloadError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Layout(error) => Self::Layout(error),
            other => Self::Misuse {
                call: "new",
                what: other.to_string(),
            },
        }
    }
}

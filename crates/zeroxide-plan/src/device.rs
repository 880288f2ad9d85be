//! What a device that computes has of the units: which of them are at home there, and the bytes of all that is.

use std::fmt;

use zeroxide_layout::STATE_BLOCK;

use crate::buckets::Mib;
use crate::error::{PlanError, Result};
use crate::home::StateHome;
use crate::placement::Placement;
use crate::unit::PlacedUnit;

/// What a user says of a device with memory of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRequest {
    /// All weights are on the device at all times; otherwise those in use and those sent for ahead.
    pub weights_stay: bool,
    /// Most bytes that weights, state and gradients may take there; `None` for no limit.
    pub limit: Option<u64>,
    /// The units whose state is at home there.
    pub state: DeviceShare,
}

/// How much of the optimizer state is at home on a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DeviceShare {
    /// That of a share of the trained elements, 0 to 1, in whole units.
    Elements(f64),
    /// As many units as fit into so many bytes beside all weights that are there.
    Room(u64),
}

/// Bytes on a device, by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceBuckets {
    /// Live weights, those of units that are at home in host memory among them.
    pub weights: u64,
    /// Gradients of units that are at home there, kept until the step.
    pub gradients: u64,
    /// Their optimizer state.
    pub optimizer: u64,
}

impl DeviceBuckets {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer
    }

    /// (name, bytes) of each.
    pub fn each(&self) -> [(&'static str, u64); 3] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        ]
    }
}

impl fmt::Display for DeviceBuckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.each().into_iter().filter(|(_, bytes)| *bytes > 0);
        let parts: Vec<String> = used
            .map(|(name, bytes)| format!("{name} {}", Mib(bytes)))
            .collect();
        f.write_str(&parts.join(", "))
    }
}

/// Gives units a home on the device as `request` has it: from the first that forward uses on, each that fits. Their
/// gradients come last in backward and their weights are needed first afterwards, so that what is left to the host
/// overlaps the most.
///
/// # Errors
/// [`PlanError::OverDeviceBudget`] where the limit is less than the weights, or than what a share comes to.
pub(crate) fn place(
    placement: &mut Placement,
    request: DeviceRequest,
    prefetch: usize,
) -> Result<DeviceBuckets> {
    let dtypes = placement.dtypes;
    let trained: u64 = placement.units.iter().map(trained_elements).sum();
    let (mut elements, room) = match request.state {
        DeviceShare::Elements(share) => (whole_part(share, trained), None),
        DeviceShare::Room(bytes) => (trained, Some(bytes)),
    };
    let mut buckets = DeviceBuckets {
        weights: weight_bytes(placement, request.weights_stay, prefetch),
        ..DeviceBuckets::default()
    };
    for unit in &mut placement.units {
        let count = trained_elements(unit);
        let (state, gradients) = (state_bytes(unit), unit.gradient_bytes(dtypes.grad));
        let fits = room.is_none_or(|room| buckets.total() + state + gradients <= room);
        if count == 0 || count > elements || !fits {
            continue;
        }
        elements -= count;
        unit.shape.state = StateHome::Device;
        buckets.optimizer += state;
        buckets.gradients += gradients;
    }
    match request.limit {
        Some(limit) if buckets.total() > limit => {
            Err(PlanError::OverDeviceBudget { limit, buckets })
        }
        _ => Ok(buckets),
    }
}

/// Bytes of a unit's optimizer state on the device: whole blocks, and no pages.
fn state_bytes(unit: &PlacedUnit) -> u64 {
    unit.local.kept / STATE_BLOCK as u64 * unit.shape.state_bytes.total()
}

/// Elements of the parameters that are trained, without padding.
fn trained_elements(unit: &PlacedUnit) -> u64 {
    let params = unit.shape.params.iter().filter(|param| param.trainable);
    params.map(|param| param.numel).sum()
}

/// `share` of `count`, in whole elements.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of 0 to 1 of a number of elements, and units are larger than what is rounded away"
)]
fn whole_part(share: f64, count: u64) -> u64 {
    ((share * count as f64).round() as u64).min(count)
}

/// Bytes of the weights that are on the device at once.
fn weight_bytes(placement: &Placement, stay: bool, prefetch: usize) -> u64 {
    let bytes = |unit: &PlacedUnit| unit.weight_bytes(placement.dtypes.compute);
    if stay {
        return placement.units.iter().map(bytes).sum();
    }
    let (held, others): (Vec<_>, Vec<_>) = placement
        .units
        .iter()
        .partition(|unit| unit.shape.held_through_backward);
    let others: Vec<u64> = others.into_iter().map(bytes).collect();
    let row = others.len().min(prefetch + 1).max(1);
    let most = others.windows(row).map(|row| row.iter().sum::<u64>()).max();
    held.into_iter().map(bytes).sum::<u64>() + most.unwrap_or(0)
}

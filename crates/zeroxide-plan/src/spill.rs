//! Room in host memory for gradients that wait on disk for the step, or that backward uses up unit by unit.

use zeroxide_layout::{Dtype, PAGE};

use crate::unit::PlacedUnit;

/// Units whose gradients are in memory at once, beside those that have room of their own: one being accumulated, one being
/// written or updated.
pub const SPILL_SLOTS: u64 = 2;

/// Room for gradients while they are accumulated. Units whose gradients come all through backward have room of their own;
/// the others take turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GradientRooms {
    /// Bytes of the rooms of their own, in whole pages each.
    pub reserved: u64,
    /// Bytes of what the others share.
    pub shared: u64,
}

impl GradientRooms {
    /// For these units, whose gradients have elements of `grad`.
    pub(crate) fn new<'a>(units: impl Iterator<Item = &'a PlacedUnit>, grad: Dtype) -> Self {
        let (mut reserved, mut largest, mut others) = (0, 0, 0);
        for unit in units {
            let bytes = unit.gradient_bytes(grad).next_multiple_of(PAGE as u64);
            if unit.shape.held_through_backward {
                reserved += bytes;
            } else {
                others += 1;
                largest = largest.max(bytes);
            }
        }
        Self {
            reserved,
            shared: largest * SPILL_SLOTS.min(others),
        }
    }

    /// All of it.
    pub const fn bytes(self) -> u64 {
        self.reserved + self.shared
    }
}

//! Room for gradients on their way between ranks.

use zeroxide_layout::{Dtype, PAGE};

use crate::home::Transport;
use crate::mesh::Mesh;
use crate::quantisation::Quantisation;
use crate::unit::PlacedUnit;

/// Units whose gradients can be on their way at once, beside those that have room of their own.
pub const SLOTS: usize = 3;

/// Room for gradients that leave this rank, and for those that arrive.
///
/// Units whose gradients come all through backward have room of their own; the others share a few slots, each as large as
/// the largest of them. A unit that finds no slot free gets memory for the time, which no plan counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transit {
    /// Indices of the units that have room of their own.
    pub reserved: Vec<usize>,
    /// Slots that the other units share.
    pub slots: usize,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Bytes for what leaves: reserved room and slots, in whole pages each.
    pub outgoing: u64,
    /// Bytes for what arrives of one unit, and for its sums where it arrives as integers; 0 where shared memory carries it.
    pub incoming: u64,
}

impl Transit {
    pub(crate) fn new(
        mesh: Mesh,
        transport: Transport,
        comm: Dtype,
        quantisation: &Quantisation,
        units: &[PlacedUnit],
    ) -> Self {
        if mesh.world() == 1 {
            return Self::default();
        }
        let page = |bytes: u64| bytes.next_multiple_of(PAGE as u64);
        let bytes = |unit: &PlacedUnit| unit.outgoing_bytes(comm);
        let mut found = Self::default();
        for (index, unit) in units.iter().enumerate() {
            if bytes(unit) == 0 {
                continue;
            }
            if unit.shape.held_through_backward {
                found.reserved.push(index);
                found.outgoing += page(bytes(unit));
            } else {
                found.slots = (found.slots + 1).min(SLOTS);
                found.slot_bytes = found.slot_bytes.max(bytes(unit));
            }
        }
        found.outgoing += found.slots as u64 * page(found.slot_bytes);
        if transport == Transport::Collective {
            let incoming = |unit: &PlacedUnit| {
                if quantisation.gradients {
                    quantisation.incoming_bytes(mesh, unit.layout.trainable_len())
                } else {
                    unit.incoming_bytes(comm)
                }
            };
            found.incoming = page(units.iter().map(incoming).max().unwrap_or(0));
        }
        found
    }
}

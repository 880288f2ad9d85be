//! Memory for what travels between ranks as integers, lent to the caller who carries it for as long as the core is there.

use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_plan::Placement;

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};

/// What the caller may have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Weights as codes, of every unit.
    Codes,
    /// What quantising has changed in gradients, of every unit.
    Residuals,
    /// Sums of gradients and messages that come in, of one unit at a time.
    Incoming,
}

/// The memory.
pub(crate) struct Rooms {
    codes: Option<Lease>,
    residuals: Option<Lease>,
    incoming: Option<Lease>,
}

impl Rooms {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        let reserve = |bucket, bytes: u64| match to_usize(bytes) {
            0 => Ok(None),
            bytes => Arena::new(budget, bucket, bytes)?
                .lease(bytes, PAGE)
                .map(Some),
        };
        let incoming = if placement.quantisation.gradients {
            placement.transit.incoming
        } else {
            0
        };
        Ok(Self {
            codes: reserve(Bucket::Weights, placement.code_bytes())?,
            residuals: reserve(Bucket::Gradients, placement.residual_bytes())?,
            incoming: reserve(Bucket::Gradients, incoming)?,
        })
    }
}

impl Core {
    /// Address and bytes of a room, zero at first.
    pub(crate) fn room(&self, room: Room) -> Result<(usize, usize)> {
        let lease = match room {
            Room::Codes => &self.rooms.codes,
            Room::Residuals => &self.rooms.residuals,
            Room::Incoming => &self.rooms.incoming,
        };
        match lease {
            Some(lease) => Ok((lease.as_ptr().expose_provenance(), lease.len())),
            None => misuse("room", format!("the plan has no room for {room:?}")),
        }
    }
}

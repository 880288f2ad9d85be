//! Gradients at home on disk: in memory while they are accumulated, written when another unit needs the room, and read
//! again by the step, one more tensor of each tile.
//!
//! The first gradient of a unit brings it into a room; what lies in the other rooms that units share starts on its way to
//! the disk then, so that the disk works while the unit is accumulated. A unit that gets more gradients after it has left,
//! of a further micro-batch or of a module that runs twice, is read back first. Nothing is rounded on the way: the bits
//! are those of gradients that never left.

use std::sync::mpsc::{Receiver, Sender, channel};

use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_plan::{PlacedUnit, Placement};
use zeroxide_storage::Completion;

use crate::core::{Core, byte_range, to_usize};
use crate::error::{Result, misuse};
use crate::gradients::kept::{GRADIENT, KeptGradients};
use crate::homes::arena;
use crate::tile_io::TileBuffer;
use crate::weights::gather::block;

/// Memory for gradients at home on disk, and what is on its way there.
pub(crate) struct Spill {
    /// Room for each unit whose gradients come all through backward; `None` where there is none.
    reserved: Option<Arena>,
    /// Room that the other units take turns in.
    shared: Option<Arena>,
    /// Whether each unit has room of its own.
    own_room: Vec<bool>,
    /// Whether each unit's gradients are only there until its update, which begins inside of backward.
    consumed: Vec<bool>,
    /// Units in the shared room, the one that came first at the front.
    present: Vec<usize>,
    /// Writes under way, of each unit.
    writes: Vec<u32>,
    replies: (Sender<Completion>, Receiver<Completion>),
}

impl Spill {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        let rooms = placement.gradient_rooms();
        let own_room = |unit: &PlacedUnit| unit.shape.held_through_backward;
        Ok(Self {
            reserved: arena(budget, Bucket::Gradients, rooms.reserved)?,
            shared: arena(budget, Bucket::Gradients, rooms.shared)?,
            own_room: placement.units.iter().map(own_room).collect(),
            consumed: placement.units.iter().map(PlacedUnit::consumes).collect(),
            present: Vec::new(),
            writes: vec![0; placement.units.len()],
            replies: channel(),
        })
    }

    fn room(&self, unit: usize) -> Option<&Arena> {
        if self.own_room[unit] {
            self.reserved.as_ref()
        } else {
            self.shared.as_ref()
        }
    }

    /// Whether the unit's gradients are only there until its update.
    pub(crate) fn is_consumed(&self, unit: usize) -> bool {
        self.consumed[unit]
    }

    /// Whether the unit takes turns with others in room for gradients.
    pub(crate) fn is_shared(&self, unit: usize) -> bool {
        !self.own_room[unit]
    }

    fn in_flight(&self) -> bool {
        self.writes.iter().any(|count| *count > 0)
    }
}

impl Core {
    /// Has the unit's gradients in memory, zero where none has arrived, if they are at home on disk.
    pub(crate) fn bring_gradients(&mut self, unit: usize) -> Result<()> {
        let spilled = match self.units[unit].grad {
            KeptGradients::Missing => false,
            KeptGradients::Spilled => true,
            KeptGradients::None | KeptGradients::Host(_) | KeptGradients::Here(_) => return Ok(()),
        };
        let outcome = self.bring(unit, spilled);
        if outcome.is_err() {
            // What did not reach the disk, or did not come back, must not be taken for a gradient.
            self.clear_gradients();
            self.drop_gradients();
        }
        outcome
    }

    fn bring(&mut self, unit: usize, spilled: bool) -> Result<()> {
        if !self.gradients.spill.own_room[unit] {
            // Those that wait for their update leave when it is done.
            for other in self.gradients.spill.present.clone() {
                if !self.gradients.spill.consumed[other] && !self.step.is_updating(other) {
                    self.spill(other)?;
                }
            }
        }
        let mut room = self.take_room(unit)?;
        if spilled {
            self.await_spills(unit)?;
            self.read_back(unit, &mut room)?;
        } else {
            room.fill(0);
        }
        self.units[unit].grad = KeptGradients::Here(room);
        if !self.gradients.spill.own_room[unit] {
            self.gradients.spill.present.push(unit);
        }
        Ok(())
    }

    /// Waits until all that is on its way to the disk is there. Before a step, which reads it.
    pub(crate) fn finish_spills(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        while outcome.is_ok() && self.gradients.spill.in_flight() {
            outcome = self.receive_spill();
        }
        if outcome.is_err() {
            self.clear_gradients();
            self.drop_gradients();
        }
        outcome
    }

    /// The same for one unit, before its update.
    pub(crate) fn await_spilled(&mut self, unit: usize) -> Result<()> {
        let outcome = self.await_spills(unit);
        if outcome.is_err() {
            self.clear_gradients();
            self.drop_gradients();
        }
        outcome
    }

    /// The step is done with the unit's gradients, or there are none: their memory is free.
    pub(crate) fn release_gradients(&mut self, unit: usize) -> Result<()> {
        match &mut self.units[unit].grad {
            KeptGradients::None | KeptGradients::Missing => {}
            KeptGradients::Host(lease) => lease.discard()?,
            KeptGradients::Here(_) | KeptGradients::Spilled => {
                self.units[unit].grad = KeptGradients::Missing;
                let spill = &mut self.gradients.spill;
                spill.present.retain(|other| *other != unit);
                if let Some(arena) = spill.room(unit) {
                    arena.discard_if_free()?;
                }
            }
        }
        Ok(())
    }

    /// A step takes no tile of the unit: what is kept of gradients at home on disk is of no use.
    pub(crate) fn release_unused(&mut self, unit: usize) -> Result<()> {
        match self.units[unit].grad {
            KeptGradients::Here(_) | KeptGradients::Spilled => self.release_gradients(unit),
            _ => Ok(()),
        }
    }

    /// Forgets gradients at home on disk, but those of units that a step still updates with them.
    pub(crate) fn drop_gradients(&mut self) {
        for unit in 0..self.units.len() {
            let grad = &mut self.units[unit].grad;
            if !self.step.is_updating(unit)
                && matches!(grad, KeptGradients::Here(_) | KeptGradients::Spilled)
            {
                *grad = KeptGradients::Missing;
                self.gradients.spill.present.retain(|other| *other != unit);
            }
        }
    }

    /// Starts to write the unit's gradients to disk; their memory is free as the writes end.
    pub(crate) fn spill(&mut self, unit: usize) -> Result<()> {
        // A step may still read them where they are.
        self.finish_unit(unit)?;
        self.await_spills(unit)?;
        self.gradients.spill.present.retain(|other| *other != unit);
        let this = &mut self.units[unit];
        if !matches!(this.grad, KeptGradients::Here(_)) {
            return Ok(());
        }
        let KeptGradients::Here(room) = std::mem::replace(&mut this.grad, KeptGradients::Spilled)
        else {
            unreachable!("looked at above");
        };
        let (tiles, element) = (this.state_tiles, self.gradients.dtype.size());
        let disk = self
            .disk
            .as_ref()
            .expect("gradients at home on disk imply one");
        let spill = &mut self.gradients.spill;
        let (id, mut rest) = (block(unit, GRADIENT), room);
        for tile in 0..tiles.count() {
            let tail = rest.split_off(byte_range(&tiles.range(tile), element).len());
            let bytes = std::mem::replace(&mut rest, tail);
            let tile = TileBuffer { id, tile, bytes };
            disk.start_write(tile, None, unit as u64, &spill.replies.0)?;
            spill.writes[unit] += 1;
        }
        Ok(())
    }

    /// Memory for the unit's gradients: where there is none, others give way, the one that came first before the rest.
    fn take_room(&mut self, unit: usize) -> Result<Lease> {
        let bytes = to_usize(self.units[unit].state_tiles.len()) * self.gradients.dtype.size();
        loop {
            let arena = self.gradients.spill.room(unit);
            if let Some(lease) = arena.and_then(|arena| arena.lease(bytes, PAGE).ok()) {
                return Ok(lease);
            }
            if self.gradients.spill.in_flight() {
                self.receive_spill()?;
            } else if let Some(first) = self.gradients.spill.present.first().copied() {
                self.give_way(first)?;
            } else {
                return misuse(
                    "accumulate",
                    format!(
                        "no room for {bytes} bytes of gradients of {}",
                        self.units[unit].name
                    ),
                );
            }
        }
    }

    /// Makes the unit's room another's: its gradients leave for the disk, or for the update that they wait for. Its turn
    /// in backward is over, and a gradient that comes after all is refused.
    fn give_way(&mut self, unit: usize) -> Result<()> {
        if !self.gradients.spill.consumed[unit] {
            return self.spill(unit);
        }
        self.update_early(unit)?;
        self.finish_unit(unit)
    }

    fn read_back(&self, unit: usize, room: &mut Lease) -> Result<()> {
        let (tiles, element) = (self.units[unit].state_tiles, self.gradients.dtype.size());
        for tile in 0..tiles.count() {
            let bytes = byte_range(&tiles.range(tile), element);
            let read = self
                .disk()
                .read_tile(block(unit, GRADIENT), tile, bytes.len())?;
            room[bytes].copy_from_slice(&read);
        }
        Ok(())
    }

    /// Waits until what of the unit is on its way to the disk is there.
    fn await_spills(&mut self, unit: usize) -> Result<()> {
        while self.gradients.spill.writes[unit] > 0 {
            self.receive_spill()?;
        }
        Ok(())
    }

    fn receive_spill(&mut self) -> Result<()> {
        let disk = self.disk.as_ref().expect("something is on its way to it");
        let completion = disk.receive(&self.gradients.spill.replies.1)?;
        self.gradients.spill.writes[to_usize(completion.tag)] -= 1;
        completion.result.map_err(Into::into)
    }
}

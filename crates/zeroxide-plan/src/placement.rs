//! What shapes and homes alone decide: layouts, shards, and the sizes of every arena.

use zeroxide_layout::{Dtype, FRAME, PAGE, STATE_BLOCK};

use crate::buckets::Buckets;
use crate::error::Result;
use crate::home::{GradientHome, StateHome, Transport, WeightHome};
use crate::mesh::Mesh;
use crate::quantisation::Quantisation;
use crate::spill::GradientRooms;
use crate::transit::Transit;
use crate::unit::{PlacedUnit, UnitShape};

/// Elements in a tile where nobody asks for another size.
pub const DEFAULT_TILE_ELEMENTS: u64 = 512 << 10;
/// Bytes of the staging ring where nobody asks for another size and the tiles need no more.
pub const DEFAULT_STAGING_BYTES: u64 = 32 << 20;
/// Tiles of one unit that the staging ring must hold at least: one being updated, one moving.
pub const MIN_TILES_IN_RING: u64 = 2;

/// Element types of what every unit has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtypes {
    /// Of the live weights.
    pub compute: Dtype,
    /// In which gradients are kept and accumulated.
    pub grad: Dtype,
    /// In which gradients travel between ranks.
    pub comm: Dtype,
}

/// Every unit with its layout and this rank's part of it, and the sizes that follow.
#[derive(Clone, Debug)]
pub struct Placement {
    /// This rank among the others.
    pub mesh: Mesh,
    /// What carries gradients. Of no meaning with one rank.
    pub transport: Transport,
    /// Element types.
    pub dtypes: Dtypes,
    /// The units, in the caller's order.
    pub units: Vec<PlacedUnit>,
    /// Room for gradients on their way between ranks.
    pub transit: Transit,
    /// What travels as integers.
    pub quantisation: Quantisation,
}

impl Placement {
    /// Lays the units out. `tile_elements` is a multiple of 2,048.
    ///
    /// # Errors
    /// [`PlanError::Layout`](crate::PlanError::Layout) for a unit that is too large, and
    /// [`PlanError::MixedUnit`](crate::PlanError::MixedUnit).
    pub fn new(
        mesh: Mesh,
        transport: Transport,
        dtypes: Dtypes,
        quantisation: Quantisation,
        tile_elements: u64,
        shapes: Vec<UnitShape>,
    ) -> Result<Self> {
        let units = shapes
            .into_iter()
            .map(|shape| PlacedUnit::new(mesh, tile_elements, shape))
            .collect::<Result<Vec<_>>>()?;
        let transit = Transit::new(mesh, transport, dtypes.comm, &quantisation, &units);
        Ok(Self {
            mesh,
            transport,
            dtypes,
            units,
            transit,
            quantisation,
        })
    }

    /// Has the gradients of every unit wait on disk whose optimizer state is there.
    pub(crate) fn spill_gradients(&mut self) {
        self.move_gradients(GradientHome::Disk);
    }

    /// Gives the gradients of every unit that home, where they can have it.
    pub(crate) fn move_gradients(&mut self, home: GradientHome) {
        for unit in &mut self.units {
            unit.shape.gradients = home;
        }
    }

    /// Bytes of the shards of weights that are at home in host memory while the whole comes and goes.
    pub fn shard_bytes(&self) -> u64 {
        self.sum(|unit| match unit.shape.weights {
            WeightHome::Shard => unit.own_bytes(self.dtypes.compute),
            _ => 0,
        })
    }

    /// Bytes of host memory for the gradients that this rank keeps for the step: all of those that wait there, and room
    /// for those that wait on disk, while they are accumulated.
    pub fn gradient_bytes(&self) -> u64 {
        self.waiting_bytes() + self.gradient_rooms().bytes()
    }

    /// Bytes of the gradients that wait for the step in host memory.
    pub fn waiting_bytes(&self) -> u64 {
        let waiting = self.units.iter().filter(|unit| !unit.in_rooms());
        waiting
            .map(|unit| unit.gradient_bytes(self.dtypes.grad))
            .sum()
    }

    /// Room in host memory for gradients that do not stay there: at home on disk, or used up inside of backward.
    pub fn gradient_rooms(&self) -> GradientRooms {
        let units = self.units.iter().filter(|unit| unit.in_rooms());
        GradientRooms::new(units, self.dtypes.grad)
    }

    /// (start, bytes) of each unit's codes in the memory for all of them; no bytes where its weights travel as they are.
    pub fn codes(&self) -> Vec<(u64, u64)> {
        in_a_row(self.units.iter().enumerate().map(|(index, unit)| {
            if self.quantisation.quantises(index) {
                self.quantisation.code_bytes(self.mesh, unit.layout.len())
            } else {
                0
            }
        }))
    }

    /// (start, bytes) of what each unit keeps for its next gradients, in the memory for all of them.
    pub fn residuals(&self) -> Vec<(u64, u64)> {
        in_a_row(self.units.iter().map(|unit| {
            self.quantisation
                .residual_bytes(self.mesh, unit.layout.trainable_len())
        }))
    }

    /// Bytes of all codes, in whole pages.
    pub fn code_bytes(&self) -> u64 {
        pages(&self.codes())
    }

    /// Bytes of all that is kept for the next gradients, in whole pages.
    pub fn residual_bytes(&self) -> u64 {
        pages(&self.residuals())
    }

    /// Bytes of the optimizer state at home in host memory.
    pub fn optimizer_bytes(&self) -> u64 {
        self.sum(PlacedUnit::optimizer_bytes)
    }

    /// Bytes of all blocks at home on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.sum(|unit| unit.disk_bytes(self.dtypes.compute, self.dtypes.grad))
    }

    /// Bytes that a durable run takes on disk: two versions of all weights and state, wherever they are at home, and one
    /// of gradients at home there, which no commit holds.
    pub fn durable_bytes(&self) -> u64 {
        self.sum(|unit| {
            2 * unit.durable_bytes(self.dtypes.compute) + unit.gradients_on_disk(self.dtypes.grad)
        })
    }

    /// Bytes that gradients take on disk where they wait for the step there.
    pub fn gradients_on_disk(&self) -> u64 {
        self.sum(|unit| unit.gradients_on_disk(self.dtypes.grad))
    }

    /// Bytes of one tile of all components in the staging ring, the largest there is; `None` where nothing is on disk.
    pub fn ring_tile(&self) -> Option<u64> {
        let compute = self.dtypes.compute.size() as u64;
        let tile = |unit: &PlacedUnit| {
            let longest = match unit.shape.weights {
                WeightHome::Disk => unit.local.own,
                _ => unit.local.kept,
            };
            let gradient = if unit.spills() {
                self.dtypes.grad.size() as u64
            } else {
                0
            };
            let elements = longest.min(unit.tile);
            elements * (compute + gradient) + unit.shape.state_bytes.paged(elements)
        };
        let on_disk = self.units.iter().filter(|unit| unit.touches_disk());
        on_disk.map(tile).max()
    }

    /// Bytes that the staging ring needs at least; `None` where nothing is on disk and there is no ring.
    pub fn ring_minimum(&self) -> Option<u64> {
        self.ring_tile().map(|tile| tile * MIN_TILES_IN_RING)
    }

    /// The unit with the most weights among those that move, and their bytes; `None` where none does.
    pub fn largest_moving(&self) -> Option<(&PlacedUnit, u64)> {
        self.moving()
            .map(|unit| (unit, unit.weight_bytes(self.dtypes.compute)))
            .max_by_key(|(_, bytes)| *bytes)
    }

    /// Bytes of frames for the units that are held at once: those held all through a pass, and the largest others in a row.
    ///
    /// With several ranks, what is at home on disk is read before it is gathered ahead: one unit more. With one, an
    /// operation may read weights of two units wherever they are.
    pub fn held_at_once(&self, prefetch: usize) -> u64 {
        let bytes = |unit: &PlacedUnit| unit.frames(self.dtypes.compute) * FRAME as u64;
        let (mut held, mut others, mut all) = (0, Vec::new(), Vec::new());
        let mut on_disk = false;
        for unit in self.moving() {
            on_disk |= unit.shape.weights == WeightHome::Disk;
            all.push(bytes(unit));
            if unit.shape.held_through_backward {
                held += bytes(unit);
            } else {
                others.push(bytes(unit));
            }
        }
        let alone = self.mesh.world() == 1;
        let reading = usize::from(on_disk && !alone && prefetch > 0);
        let row = others.len().min(prefetch + 1 + reading);
        let in_a_row = match row {
            0 => 0,
            row => others
                .windows(row)
                .map(|row| row.iter().sum())
                .max()
                .unwrap_or(0),
        };
        if !alone {
            return held + in_a_row;
        }
        all.sort_unstable();
        let two: u64 = all.iter().rev().take(2).sum();
        two.max(held + in_a_row)
    }

    /// Bytes of frames for a pool of `gathered_bytes`; 0 where no weights move.
    pub fn frame_bytes(&self, gathered_bytes: u64) -> u64 {
        match self.moving().next() {
            None => 0,
            Some(_) => gathered_bytes.next_multiple_of(FRAME as u64),
        }
    }

    /// Payload by bucket, with a staging ring of `staging_bytes` (whole pages) and frames of `gathered_bytes`, as the core
    /// reserves it.
    pub fn buckets(&self, staging_bytes: u64, gathered_bytes: u64) -> Buckets {
        let whole = self.sum(|unit| match unit.shape.weights {
            WeightHome::Host if !unit.is_away() => unit.weight_bytes(self.dtypes.compute),
            _ => 0,
        });
        Buckets {
            weights: whole + self.shard_bytes() + self.code_bytes(),
            gradients: self.gradient_bytes()
                + self.transit.outgoing
                + self.transit.incoming
                + self.residual_bytes(),
            optimizer: self.optimizer_bytes(),
            staging: match self.ring_tile() {
                None => 0,
                Some(_) => staging_bytes,
            },
            gathered: self.frame_bytes(gathered_bytes),
        }
    }

    /// Bytes that filling takes beside the ring, at most, for the state on disk of one unit: (initial values of weights,
    /// any state tensor).
    pub fn filling_bytes(&self) -> (u64, u64) {
        let most = |bytes: fn(&PlacedUnit) -> u64| {
            let on_disk = self.units.iter().filter(|unit| unit.state_on_disk());
            on_disk.map(bytes).max().unwrap_or(0)
        };
        (
            most(|unit| unit.tiled(unit.shape.state_bytes.master)),
            most(|unit| unit.tiled(unit.shape.state_bytes.largest)),
        )
    }

    /// Bytes (read, written) on disk by one update of everything that is trained, weights that are read left out.
    pub(crate) fn update_traffic(&self) -> (u64, u64) {
        let state = |unit: &PlacedUnit| match unit.shape.state {
            StateHome::Disk => unit.state_tile_bytes(),
            StateHome::Host | StateHome::Device => 0,
        };
        let weights = |unit: &PlacedUnit| match unit.shape.weights {
            WeightHome::Disk if unit.local.kept > 0 => {
                unit.local.kept * self.dtypes.compute.size() as u64
            }
            _ => 0,
        };
        let (state, gradients) = (self.sum(state), self.spilled_bytes());
        (state + gradients, state + self.sum(weights) + gradients)
    }

    /// Bytes of optimizer state at home in host memory that nothing writes before the first update, and that share no huge
    /// page with what is written: units follow one another in one arena, each what is written first.
    pub(crate) fn untouched_state_bytes(&self) -> u64 {
        let (mut at, mut touched) = (0, 0);
        let mut untouched = 0;
        for unit in &self.units {
            if unit.shape.state != StateHome::Host {
                continue;
            }
            let written = unit.local.kept / STATE_BLOCK as u64 * unit.shape.state_bytes.written;
            if written > 0 {
                untouched += (at / FRAME as u64 * FRAME as u64).saturating_sub(touched);
                touched = (at + written).next_multiple_of(FRAME as u64);
            }
            at += unit.state_bytes();
        }
        untouched + at.saturating_sub(touched)
    }

    /// Bytes of gradients that a backward writes to disk and the update reads again. Backward uses units from the last to
    /// the first, and each gives way to the next: what it ends with, and what is held all through it, is in memory still.
    fn spilled_bytes(&self) -> u64 {
        let spilling = self.units.iter().filter(|unit| unit.spills());
        let in_a_row = spilling.filter(|unit| !unit.shape.held_through_backward);
        in_a_row
            .skip(1)
            .map(|unit| unit.gradient_bytes(self.dtypes.grad))
            .sum()
    }

    /// What a step reads less, and what it writes more at the most, if backward updates before it is known whether the step clips and
    /// it does not: gradients of every unit leave with its update, and none is read. Bytes.
    pub fn speculation_traffic(&self) -> (u64, u64) {
        let leaves = |unit: &PlacedUnit| {
            if unit.shape.held_through_backward {
                0
            } else {
                unit.gradients_on_disk(self.dtypes.grad)
            }
        };
        let spilled = self.spilled_bytes();
        (spilled, self.sum(leaves) - spilled)
    }

    fn moving(&self) -> impl Iterator<Item = &PlacedUnit> {
        self.units.iter().filter(|unit| unit.shape.weights.moves())
    }

    fn sum(&self, bytes: impl Fn(&PlacedUnit) -> u64) -> u64 {
        self.units.iter().map(bytes).sum()
    }
}

/// Bytes of all of these, in whole pages.
fn pages(row: &[(u64, u64)]) -> u64 {
    let end = row.last().map_or(0, |(start, bytes)| start + bytes);
    end.next_multiple_of(PAGE as u64)
}

/// (start, bytes) of each of these when they follow one another.
fn in_a_row(sizes: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut end = 0;
    sizes
        .map(|bytes| {
            let start = end;
            end += bytes;
            (start, bytes)
        })
        .collect()
}

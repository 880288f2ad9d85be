//! Which units are in memory.

use zeroxide_layout::FRAME;

use crate::home::WeightHome;
use crate::plan::Plan;

/// Units in memory, as the core has them: those in use, and as many others as fit.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes of each unit's frames.
    sizes: Vec<u64>,
    /// Bytes of the part of each unit that this rank has on disk.
    own: Vec<u64>,
    trainable: Vec<bool>,
    read: u64,
    capacity: u64,
    on_disk: bool,
    /// Units in memory, the one used longest ago first.
    present: Vec<usize>,
    held: Vec<bool>,
    /// All ranks' parts are there.
    whole: Vec<bool>,
}

impl Frames {
    pub(super) fn new(plan: &Plan) -> Self {
        let units = &plan.placement.units;
        let compute = plan.placement.dtypes.compute;
        Self {
            sizes: units
                .iter()
                .map(|unit| unit.frames(compute) * FRAME as u64)
                .collect(),
            own: units.iter().map(|unit| unit.own_bytes(compute)).collect(),
            read: 0,
            trainable: units
                .iter()
                .map(|unit| unit.layout.trainable_len() > 0)
                .collect(),
            capacity: plan.gathered_bytes,
            on_disk: plan.weights == WeightHome::Disk,
            present: Vec::new(),
            held: vec![false; units.len()],
            whole: vec![false; units.len()],
        }
    }

    /// Begins to count what is read.
    pub(super) fn start_step(&mut self) {
        self.read = 0;
    }

    /// Bytes read from disk since the step began.
    pub(super) fn read_bytes(&self) -> u64 {
        if self.on_disk { self.read } else { 0 }
    }

    /// The other ranks' parts of what is trained have changed.
    pub(super) fn end_step(&mut self) {
        for (whole, trainable) in self.whole.iter_mut().zip(&self.trainable) {
            *whole &= !trainable;
        }
    }

    /// Uses a unit; whether all of it was there. Afterwards it is.
    pub(super) fn hold(&mut self, unit: usize) -> bool {
        if !self.present.contains(&unit) {
            self.make_room(unit);
            self.read += self.own[unit];
        }
        self.touch(unit);
        self.held[unit] = true;
        std::mem::replace(&mut self.whole[unit], true)
    }

    /// Whether the unit fits beside those in use.
    pub(super) fn has_room(&self, unit: usize) -> bool {
        let held = (0..self.sizes.len()).filter(|other| *other == unit || self.held[*other]);
        held.map(|other| self.sizes[other]).sum::<u64>() <= self.capacity
    }

    /// Ends the use of a unit. It stays until its frames are needed.
    ///
    /// Not so with weights from disk: how long they stay depends on the disk, and would differ by rank.
    pub(super) fn release(&mut self, unit: usize) {
        if std::mem::take(&mut self.held[unit]) {
            self.touch(unit);
            self.whole[unit] &= !self.on_disk;
        }
    }

    fn touch(&mut self, unit: usize) {
        self.present.retain(|other| *other != unit);
        self.present.push(unit);
    }

    fn make_room(&mut self, unit: usize) {
        let size = |unit: usize| self.sizes[unit];
        while self.present.iter().copied().map(size).sum::<u64>() + size(unit) > self.capacity {
            let Some(oldest) = self.present.iter().position(|other| !self.held[*other]) else {
                return;
            };
            let oldest = self.present.remove(oldest);
            self.whole[oldest] = false;
        }
    }
}

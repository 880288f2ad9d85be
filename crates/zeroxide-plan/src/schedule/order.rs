//! The order in which one pass uses the units.

/// The order of the last step, and where the present one is in it.
#[derive(Debug, Default)]
pub(super) struct GatherOrder {
    known: Vec<usize>,
    seen: Vec<usize>,
    position: usize,
}

impl GatherOrder {
    /// Begins a step: what was seen in the last one becomes what is known.
    pub(super) fn start(&mut self) {
        if !self.seen.is_empty() {
            self.known = std::mem::take(&mut self.seen);
        }
        self.position = 0;
    }

    /// Records that `unit` is gathered now, if it was not the one before. The position moves to its next place.
    pub(super) fn note(&mut self, unit: usize) {
        if self.seen.last() == Some(&unit) {
            return;
        }
        self.seen.push(unit);
        let found = self.rest().iter().position(|known| *known == unit);
        if let Some(found) = found {
            self.position += found + 1;
        }
    }

    /// All units that are still to come.
    pub(super) fn rest(&self) -> &[usize] {
        &self.known[self.position..]
    }
}

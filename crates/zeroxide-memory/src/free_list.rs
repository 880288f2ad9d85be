//! Which bytes of a range are free.

use std::collections::BTreeMap;
use std::ops::Range;

/// The holes of a byte range, kept by address, none empty and no two touching.
#[derive(Debug)]
pub(crate) struct FreeList {
    capacity: usize,
    free: usize,
    /// Start of each hole -> its end.
    holes: BTreeMap<usize, usize>,
}

impl FreeList {
    /// `capacity` bytes, all free.
    pub(crate) fn new(capacity: usize) -> Self {
        let holes = (capacity > 0)
            .then_some((0, capacity))
            .into_iter()
            .collect();
        Self {
            capacity,
            free: capacity,
            holes,
        }
    }

    /// Free bytes.
    pub(crate) fn free(&self) -> usize {
        self.free
    }

    /// Bytes that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.capacity - self.free
    }

    /// Bytes of the largest hole.
    pub(crate) fn largest(&self) -> usize {
        self.holes
            .iter()
            .map(|(start, end)| end - start)
            .max()
            .unwrap_or(0)
    }

    /// Takes the first `len` bytes that start at a multiple of `align`, and returns where they start.
    pub(crate) fn take_first(&mut self, len: usize, align: usize) -> Option<usize> {
        let start = self.holes.iter().find_map(|(&start, &end)| {
            let start = start.checked_next_multiple_of(align)?;
            (start.checked_add(len)? <= end).then_some(start)
        })?;
        self.take(start..start + len).then_some(start)
    }

    /// Takes exactly `range`; false, and nothing taken, when any of it is not free.
    pub(crate) fn take(&mut self, range: Range<usize>) -> bool {
        let Some((&start, &end)) = self.holes.range(..=range.start).next_back() else {
            return false;
        };
        if range.is_empty() || end < range.end {
            return false;
        }
        self.holes.remove(&start);
        if start < range.start {
            self.holes.insert(start, range.start);
        }
        if range.end < end {
            self.holes.insert(range.end, end);
        }
        self.free -= range.len();
        true
    }

    /// Gives `range` back and joins it with the holes it touches. The range was taken, whole or in parts.
    pub(crate) fn give(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        debug_assert!(
            end <= self.capacity,
            "{range:?} is outside {} bytes",
            self.capacity
        );
        if let Some((&before, &before_end)) = self.holes.range(..start).next_back() {
            debug_assert!(before_end <= start, "{range:?} was free already");
            if before_end == start {
                self.holes.remove(&before);
                start = before;
            }
        }
        if let Some((&after, &after_end)) = self.holes.range(range.start..).next() {
            debug_assert!(after >= end, "{range:?} was free already");
            if after == end {
                self.holes.remove(&after);
                end = after_end;
            }
        }
        self.holes.insert(start, end);
        self.free += range.len();
    }
}

//! Physical memory in frames that can be moved under a window.

use std::sync::{Arc, Mutex, PoisonError};

use crate::map::Mapping;
use crate::{Bucket, Budget, ForkGuard, MemoryError, Reservation};

pub use zeroxide_layout::FRAME;

/// A fixed number of frames, counted in a budget from creation until the pool, its clones and its last
/// frame are gone.
///
/// Frames get their physical memory when first written through a window and keep it. The frame returned
/// last is handed out first, so that a working set smaller than the pool touches no more memory than it
/// needs.
#[derive(Clone, Debug)]
pub struct FramePool {
    slots: Arc<Slots>,
}

#[derive(Debug)]
struct Slots {
    mapping: Mapping,
    guard: ForkGuard,
    capacity: usize,
    /// Indices of free slots, the next to hand out last.
    free: Mutex<Vec<usize>>,
    _reservation: Reservation,
}

/// One frame, taken from its pool: a slot of the pool's own address range, and the pages that lie there
/// while no window has them. Dropping it returns it to the pool.
#[derive(Debug)]
pub struct Frame {
    slots: Arc<Slots>,
    index: usize,
}

impl FramePool {
    /// A pool of `frames` frames of [`FRAME`] bytes.
    ///
    /// # Errors
    /// [`MemoryError::OverBudget`], [`MemoryError::InvalidRequest`] for no frames at all or more than the
    /// address space holds, [`MemoryError::Os`].
    pub fn new(budget: &Budget, bucket: Bucket, frames: usize) -> Result<Self, MemoryError> {
        let bytes = frames.checked_mul(FRAME).filter(|&bytes| bytes > 0).ok_or(
            MemoryError::InvalidRequest {
                what: "frames in pool",
                got: frames,
                expected: "more than 0, less than the address space",
            },
        )?;
        let reservation = budget.reserve(bucket, bytes as u64)?;
        let slots = Slots {
            mapping: Mapping::zeroed(bytes)?,
            guard: ForkGuard::new(),
            capacity: frames,
            free: Mutex::new((0..frames).rev().collect()),
            _reservation: reservation,
        };
        Ok(Self {
            slots: Arc::new(slots),
        })
    }

    /// Takes `count` frames, or `None` when fewer are free, or in a forked child (see
    /// [`check_process`](Self::check_process)).
    pub fn take(&self, count: usize) -> Option<Vec<Frame>> {
        self.check_process().ok()?;
        let mut free = self
            .slots
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let rest = free.len().checked_sub(count)?;
        let taken = free.split_off(rest);
        let frame = |index| Frame {
            slots: Arc::clone(&self.slots),
            index,
        };
        Some(taken.into_iter().rev().map(frame).collect())
    }

    /// Frames that can be taken now; 0 in a forked child.
    pub fn free(&self) -> usize {
        if self.slots.guard.is_forked() {
            return 0;
        }
        self.slots
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Frames in all.
    pub fn capacity(&self) -> usize {
        self.slots.capacity
    }

    /// Accepts the process that made the pool.
    ///
    /// # Errors
    /// [`MemoryError::Forked`] in any other process.
    pub fn check_process(&self) -> Result<(), MemoryError> {
        Ok(self.slots.guard.check_process()?)
    }
}

impl Frame {
    /// The frame's home: the pool's mapping and the byte offset of its slot.
    pub(crate) fn home(&self) -> (&Mapping, usize) {
        (&self.slots.mapping, self.index * FRAME)
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if !self.slots.guard.is_forked() {
            let mut free = self
                .slots
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            free.push(self.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::tests::ends_in_child;

    #[test]
    fn a_lock_held_at_the_fork_does_not_hang_the_child() {
        let pool = FramePool::new(&Budget::new(None), Bucket::Gathered, 2).unwrap();
        let frames = std::cell::Cell::new(pool.take(1));
        let held = pool.slots.free.lock().unwrap();
        // The parent's frames are dropped after the lock is.
        let ended = ends_in_child(|| {
            drop(frames.take());
            assert_eq!((pool.free(), pool.take(0).is_none()), (0, true));
        });
        drop(held);
        assert!(ended);
    }
}

//! One address range, what backs it, and which of its bytes are leased.

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::frames::Frame;
use crate::free_list::FreeList;
use crate::map::Mapping;
use crate::{ForkGuard, Lease, MemoryError, Reservation, window};

/// Where the bytes under a region are.
#[derive(Debug)]
pub(crate) enum Backing {
    /// Nowhere: an access faults.
    Empty,
    /// In frames of a pool, whose pages lie under the range in this order.
    Frames(Vec<Frame>),
    /// In memory of the region's own, counted by the reservation.
    Owned(
        #[expect(dead_code, reason = "held to count the bytes until the region is gone")]
        Reservation,
    ),
}

/// Shared by an arena or a window and by every lease on it; whoever drops it last frees the memory.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: Mapping,
    guard: ForkGuard,
    state: Mutex<RegionState>,
}

/// One lock for both: a lease is given out only on memory that is there, and memory under a lease does
/// not change.
#[derive(Debug)]
pub(crate) struct RegionState {
    pub(crate) free: FreeList,
    pub(crate) backing: Backing,
}

impl Region {
    /// A region over the first `len` bytes of `mapping`.
    pub(crate) fn new(mapping: Mapping, len: usize, backing: Backing) -> Arc<Self> {
        debug_assert!(len <= mapping.len());
        let state = Mutex::new(RegionState {
            free: FreeList::new(len),
            backing,
        });
        Arc::new(Self {
            mapping,
            guard: ForkGuard::new(),
            state,
        })
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    /// The state, in the process that made the region.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, RegionState>, MemoryError> {
        self.guard.check_process()?;
        // No operation leaves the state half changed when it panics.
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Leases the first free `len` bytes at a multiple of `align`.
    pub(crate) fn lease_first(
        self: &Arc<Self>,
        len: usize,
        align: usize,
    ) -> Result<Lease, MemoryError> {
        let mut state = self.lock()?;
        let Some(start) = state.free.take_first(len, align) else {
            let (free, largest) = (state.free.free(), state.free.largest());
            return Err(MemoryError::Exhausted {
                need: len,
                align,
                free,
                largest,
            });
        };
        Ok(Lease::new(Arc::clone(self), start..start + len))
    }

    /// Gives a leased range back.
    pub(crate) fn give_back(&self, range: Range<usize>) {
        // In a forked child the books are a copy that nobody reads.
        if let Ok(mut state) = self.lock() {
            state.free.give(range);
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.guard.is_forked() {
            return;
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Backing::Frames(frames) = std::mem::replace(&mut state.backing, Backing::Empty)
            && window::move_home(&self.mapping, &frames).is_err()
        {
            // The home of a frame that could not move may be unusable: its pool must not hand it out.
            let _kept = ManuallyDrop::new(frames);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::tests::ends_in_child;

    #[test]
    fn a_lock_held_at_the_fork_does_not_hang_the_child() {
        let region = Region::new(Mapping::zeroed(1).unwrap(), 1, Backing::Empty);
        let lease = std::cell::Cell::new(Some(region.lease_first(1, 1).unwrap()));
        let held = region.lock().unwrap();
        // The parent's lease is dropped after the lock is.
        let ended = ends_in_child(|| {
            drop(lease.take());
            assert!(region.lease_first(1, 1).is_err());
        });
        drop(held);
        assert!(ended);
    }
}

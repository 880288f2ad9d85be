//! One mapping, leased in ranges.

use std::sync::Arc;

use zeroxide_layout::{PAGE, checked_align_up_usize};

use crate::map::{HUGE_PAGE, Mapping};
use crate::region::{Backing, Region};
use crate::{Bucket, Budget, Lease, MemoryError};

/// One anonymous mapping, 2 MiB aligned with huge pages advised, leased first fit.
///
/// Its bytes, rounded up to 4 KiB and to nothing more, are counted in the budget from creation until
/// the arena, its clones and its last lease are gone. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Arena {
    region: Arc<Region>,
    capacity: usize,
}

impl Arena {
    /// An arena of `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::OverBudget`], [`MemoryError::InvalidRequest`] for 0 bytes, or [`MemoryError::Os`].
    pub fn new(budget: &Budget, bucket: Bucket, bytes: usize) -> Result<Self, MemoryError> {
        let capacity = checked_align_up_usize(bytes, PAGE)
            .filter(|&capacity| capacity > 0)
            .ok_or(MemoryError::InvalidRequest {
                what: "arena size",
                got: bytes,
                expected: "more than 0",
            })?;
        let reservation = budget.reserve(bucket, capacity as u64)?;
        let mapping = Mapping::zeroed(capacity)?;
        Ok(Self {
            region: Region::new(mapping, capacity, Backing::Owned(reservation)),
            capacity,
        })
    }

    /// Leases `len` bytes whose address is a multiple of `align`.
    ///
    /// # Errors
    /// [`MemoryError::InvalidRequest`] for a length of 0 or an alignment that is not a power of two up to
    /// 2 MiB, [`MemoryError::Exhausted`] when no hole is large enough, [`MemoryError::Forked`].
    pub fn lease(&self, len: usize, align: usize) -> Result<Lease, MemoryError> {
        if len == 0 {
            return Err(MemoryError::InvalidRequest {
                what: "lease length",
                got: len,
                expected: "more than 0",
            });
        }
        if !align.is_power_of_two() || align > HUGE_PAGE {
            return Err(MemoryError::InvalidRequest {
                what: "lease alignment",
                got: align,
                expected: "a power of two up to 2 MiB",
            });
        }
        self.region.lease_first(len, align)
    }

    /// Gives the arena's memory back to the operating system until it is written again, if no lease is alive; its bytes
    /// are zero then. Returns whether it did.
    ///
    /// # Errors
    /// [`MemoryError::Forked`], [`MemoryError::Os`].
    pub fn discard_if_free(&self) -> Result<bool, MemoryError> {
        match self.region.lease_first(self.capacity, PAGE) {
            Ok(mut whole) => whole.discard().map(|()| true),
            Err(MemoryError::Exhausted { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Bytes of the arena, a multiple of 4 KiB.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that are not leased.
    ///
    /// # Errors
    /// [`MemoryError::Forked`].
    pub fn free(&self) -> Result<usize, MemoryError> {
        Ok(self.region.lock()?.free.free())
    }

    /// Address of the first byte, for registration with a device. The memory is valid while the arena
    /// or a lease on it lives.
    pub fn base(&self) -> *mut u8 {
        self.region.base().as_ptr()
    }
}

//! Unique ownership of a byte range.
#![expect(unsafe_code, reason = "slices over memory that the region owns")]

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use zeroxide_layout::PAGE;

use crate::MemoryError;
use crate::region::Region;

/// The unique owner of a byte range of an [`Arena`](crate::Arena) or a [`Window`](crate::Window).
///
/// A lease keeps its memory alive whatever happens to the arena or window it came from, so it can be
/// moved into an operation that the kernel or a device finishes later. Dropping it gives the range back.
/// Bytes are those the previous owner left, zero at first.
#[must_use = "dropping a lease gives its range back"]
pub struct Lease {
    owner: Owner,
    range: Range<usize>,
}

/// Whose memory a lease is a part of. Ranges count from the first byte of it.
#[derive(Clone)]
enum Owner {
    /// An arena's or a window's; the range goes back to its free list.
    Region(Arc<Region>),
    /// Somebody else's, kept alive through what they gave.
    Foreign {
        base: usize,
        keep: Arc<dyn std::any::Any + Send + Sync>,
    },
}

impl Lease {
    /// The lease of `range`, which the caller has taken from the region's free list, where there is
    /// memory under it.
    pub(crate) fn new(region: Arc<Region>, range: Range<usize>) -> Self {
        Self {
            owner: Owner::Region(region),
            range,
        }
    }

    /// A lease on memory that belongs to somebody else, alive for as long as `keep` is.
    ///
    /// # Safety
    /// `address` must be the start of `len` initialised bytes that `keep` keeps alive, and until the lease and
    /// all leases split off it are dropped, nobody else may read or write them.
    pub unsafe fn foreign(
        address: *mut u8,
        len: usize,
        keep: Arc<dyn std::any::Any + Send + Sync>,
    ) -> Self {
        let base = address.expose_provenance();
        Self {
            owner: Owner::Foreign { base, keep },
            range: 0..len,
        }
    }

    /// Bytes owned.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether the lease owns no byte, which only [`split_off`](Self::split_off) can make.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Offset of the first byte in the arena or window, in bytes.
    pub fn offset(&self) -> usize {
        self.range.start
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.address()
    }

    /// Address of the first byte, for writing.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.address()
    }

    /// What keeps memory under the lease's addresses after the lease is gone, for a device that knows them. It gives no
    /// right to the bytes, which others may lease then.
    pub fn anchor(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        match &self.owner {
            Owner::Region(region) => Arc::clone(region) as Arc<_>,
            Owner::Foreign { keep, .. } => Arc::clone(keep),
        }
    }

    /// Cuts the lease in two: `self` keeps the first `at` bytes, the rest is returned.
    ///
    /// # Panics
    /// When `at` exceeds the length.
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(
            at <= self.len(),
            "split at {at} of a lease of {} bytes",
            self.len()
        );
        let middle = self.range.start + at;
        let rest = Self {
            owner: self.owner.clone(),
            range: middle..self.range.end,
        };
        self.range.end = middle;
        rest
    }

    /// Sets every byte to zero and gives the memory back to the operating system until it is written again. The
    /// lease stays what it is.
    ///
    /// # Errors
    /// [`MemoryError::Os`]. Memory that is somebody else's is only set to zero.
    pub fn discard(&mut self) -> Result<(), MemoryError> {
        match &self.owner {
            Owner::Region(region) => {
                // SAFETY: the range is this lease's alone, and `&mut self` keeps everyone else away.
                unsafe { region.mapping().discard(self.range.start, self.range.len()) }?;
                // Whole pages read as zero now; what the lease has of the pages at its edges does not.
                let first =
                    self.range.start.next_multiple_of(PAGE).min(self.range.end) - self.range.start;
                let last = (self.range.end / PAGE * PAGE).max(self.range.start) - self.range.start;
                self[..first].fill(0);
                self[last.max(first)..].fill(0);
            }
            Owner::Foreign { .. } => self.fill(0),
        }
        Ok(())
    }

    fn address(&self) -> *mut u8 {
        let base = match &self.owner {
            Owner::Region(region) => region.base().as_ptr(),
            Owner::Foreign { base, .. } => std::ptr::with_exposed_provenance_mut(*base),
        };
        base.wrapping_add(self.range.start)
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the region's free list gave the range to this lease alone, the region keeps memory
        // under it while it is taken, and anonymous memory is always initialised; for foreign memory the
        // caller of `foreign` has promised the same.
        unsafe { std::slice::from_raw_parts(self.address(), self.len()) }
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len()) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Owner::Region(region) = &self.owner {
            region.give_back(self.range.clone());
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("address", &self.as_ptr())
            .field("len", &self.len())
            .finish()
    }
}

mod sealed {
    /// Types without padding for which every bit pattern is a value.
    pub trait Sealed {}
}

/// Element types that a lease's bytes can be viewed as. Any bytes are valid values of them.
pub trait Pod: sealed::Sealed + Copy + Send + Sync + 'static {}

macro_rules! pod {
    ($($element:ty),*) => { $(
        impl sealed::Sealed for $element {}
        impl Pod for $element {}
    )* };
}
pod!(u8, u16, u32, u64, f32);

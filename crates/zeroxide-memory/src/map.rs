//! Address ranges, and the system calls that decide what lies under them.
#![expect(unsafe_code, reason = "system calls on address ranges")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use libc::{c_int, c_void};
use zeroxide_layout::{PAGE, checked_align_up_usize};

use crate::{ForkGuard, MemoryError};

/// Every mapping starts at a multiple of this, so that huge pages fit from its first byte on.
pub(crate) const HUGE_PAGE: usize = zeroxide_layout::FRAME;

/// An address range of whole pages that belongs to this object alone, from its creation until it is
/// dropped. There is always a mapping on every page of it: nothing else can be mapped in between.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    guard: ForkGuard,
}

// SAFETY: a mapping is an address range, not a thread's property; the methods that change what lies
// under it are `unsafe` and ask their callers for exclusivity.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; shared references give out the address and length only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A range of `len` bytes (rounded up to pages) with no memory under it: any access faults.
    pub(crate) fn reserve(len: usize) -> Result<Self, MemoryError> {
        let invalid = MemoryError::InvalidRequest {
            what: "mapping size",
            got: len,
            expected: "more than 0, less than the address space",
        };
        let Some((len, whole)) = checked_align_up_usize(len, PAGE)
            .and_then(|len| Some((len, len.checked_add(HUGE_PAGE)?)))
            .filter(|&(len, _)| len > 0)
        else {
            return Err(invalid);
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(os_error("mmap (reserve addresses)", whole));
        }
        let start = start.cast::<u8>();
        let head = start.align_offset(HUGE_PAGE);
        let base = start.wrapping_add(head);
        trim(start, head);
        trim(base.wrapping_add(len), whole - head - len);
        let base = NonNull::new(base).expect("mmap returns no null address without MAP_FIXED");
        Ok(Self {
            base,
            len,
            guard: ForkGuard::new(),
        })
    }

    /// A range of `len` bytes (rounded up to pages) with zeroed, readable and writable memory.
    pub(crate) fn zeroed(len: usize) -> Result<Self, MemoryError> {
        let mapping = Self::reserve(len)?;
        // SAFETY: the range is new, nobody has its address yet.
        unsafe { mapping.commit(mapping.len) }?;
        Ok(mapping)
    }

    /// First byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes, a multiple of the page size.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts zeroed, readable and writable memory under the first `len` bytes, with huge pages advised.
    ///
    /// # Safety
    /// Nothing may refer to a byte of the range: what lay under it is lost.
    pub(crate) unsafe fn commit(&self, len: usize) -> Result<(), MemoryError> {
        // SAFETY: forwarded to the caller.
        unsafe {
            self.replace(
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                0,
                "mmap (allocate)",
            )
        }?;
        // Without huge pages the memory works the same, only slower: a kernel that has none refuses.
        let _ = self.advise(libc::MADV_HUGEPAGE, "madvise (huge pages)");
        Ok(())
    }

    /// Puts `len` bytes of `file` from `offset` on, readable, writable and shared with every other process that maps
    /// them, under the first `len` bytes, with huge pages advised.
    ///
    /// # Safety
    /// Nothing may refer to a byte of the range: what lay under it is lost. Others may change the bytes at any time:
    /// whoever makes references to them has to have an agreement with the other processes.
    pub(crate) unsafe fn commit_shared(
        &self,
        len: usize,
        file: &File,
        offset: usize,
    ) -> Result<(), MemoryError> {
        let start = self.range(0, len);
        let Ok(from) = libc::off_t::try_from(offset) else {
            return Err(MemoryError::InvalidRequest {
                what: "offset in shared memory",
                got: offset,
                expected: "less than the largest file",
            });
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: MAP_FIXED replaces pages of this mapping's own range only; the caller promises that nothing refers to
        // them.
        let mapped = unsafe { libc::mmap(start, len, protection, flags, file.as_raw_fd(), from) };
        if mapped == libc::MAP_FAILED {
            return Err(os_error("mmap (shared memory)", len));
        }
        let _ = self.advise(libc::MADV_HUGEPAGE, "madvise (huge pages)");
        Ok(())
    }

    /// Takes away what lies under the whole range: any access faults afterwards.
    ///
    /// # Safety
    /// Nothing may refer to a byte of the range: what lay under it is lost.
    pub(crate) unsafe fn seal(&self) -> Result<(), MemoryError> {
        // SAFETY: forwarded to the caller.
        unsafe {
            self.replace(
                self.len,
                libc::PROT_NONE,
                libc::MAP_NORESERVE,
                "mmap (seal window)",
            )
        }
    }

    /// Makes any access to the whole range fault. What lies there stays, and moves with its pages.
    ///
    /// # Safety
    /// Nothing refers to a byte of the range but those whose access is to fault.
    pub(crate) unsafe fn forbid(&self) -> Result<(), MemoryError> {
        // SAFETY: forwarded to the caller.
        unsafe { self.protect(0, self.len, libc::PROT_NONE) }
    }

    /// Undoes [`forbid`](Self::forbid) for a part of the range, or for pages that have moved there since.
    ///
    /// # Safety
    /// Nobody relies on a fault there.
    pub(crate) unsafe fn permit(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        // SAFETY: forwarded to the caller.
        unsafe { self.protect(offset, len, libc::PROT_READ | libc::PROT_WRITE) }
    }

    unsafe fn protect(
        &self,
        offset: usize,
        len: usize,
        protection: c_int,
    ) -> Result<(), MemoryError> {
        let start = self.range(offset, len);
        // SAFETY: the range lies inside this mapping (checked by `range`); who may use it is the caller's promise.
        if unsafe { libc::mprotect(start, len, protection) } != 0 {
            return Err(os_error("mprotect", len));
        }
        Ok(())
    }

    /// Gives the pages wholly inside the range back; its bytes read as zero, here or as they were at the edges.
    ///
    /// # Safety
    /// Nobody else reads or writes the range during the call.
    pub(crate) unsafe fn discard(&self, offset: usize, len: usize) -> Result<(), MemoryError> {
        let start = offset.next_multiple_of(PAGE);
        let end = (offset + len) / PAGE * PAGE;
        if start >= end {
            return Ok(());
        }
        // SAFETY: the pages are inside this private anonymous mapping, and the caller keeps others away.
        let status = unsafe {
            libc::madvise(
                self.range(start, end - start),
                end - start,
                libc::MADV_DONTNEED,
            )
        };
        if status == 0 {
            Ok(())
        } else {
            Err(os_error("madvise", end - start))
        }
    }

    /// Moves the pages under `len` bytes at `offset` to `target_offset` of `target`, protection and
    /// advice included. The target's own pages there are dropped; the source stays mapped, with no
    /// pages. Both ranges are mapped at every moment in between, so no other thread's mapping can land
    /// there (`mremap` with `MREMAP_DONTUNMAP`, Linux 5.7).
    ///
    /// # Safety
    /// Nothing may refer to a byte of either range. The source has to lie in one kernel mapping, which
    /// holds for a frame: all changes happen at frame boundaries.
    ///
    /// # Errors
    /// [`MemoryError::Os`]: the source keeps its pages. The target may have lost both its pages and its
    /// protection; its addresses stay reserved.
    pub(crate) unsafe fn move_pages(
        &self,
        offset: usize,
        len: usize,
        target: &Self,
        target_offset: usize,
    ) -> Result<(), MemoryError> {
        let source = self.range(offset, len);
        let target = target.range(target_offset, len);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: both ranges lie inside mappings this crate owns (checked by `range`); the caller
        // promises that nothing refers to them.
        let moved = unsafe { libc::mremap(source, len, len, flags, target) };
        if moved == libc::MAP_FAILED {
            let error = os_error("mremap (move pages)", len);
            refill(target, len);
            return Err(error);
        }
        Ok(())
    }

    fn range(&self, offset: usize, len: usize) -> *mut c_void {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{offset} + {len} of {} bytes",
            self.len
        );
        self.base.as_ptr().wrapping_add(offset).cast()
    }

    /// # Safety
    /// Nothing may refer to a byte of the range.
    unsafe fn replace(
        &self,
        len: usize,
        protection: c_int,
        extra: c_int,
        call: &'static str,
    ) -> Result<(), MemoryError> {
        let start = self.range(0, len);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | extra;
        // SAFETY: MAP_FIXED replaces pages of this mapping's own range only; the caller promises that
        // nothing refers to them.
        let start = unsafe { libc::mmap(start, len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(os_error(call, len));
        }
        Ok(())
    }

    fn advise(&self, advice: c_int, call: &'static str) -> Result<(), MemoryError> {
        // SAFETY: the range is this mapping's own; the advices used here change no byte of it.
        let status = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) };
        if status != 0 {
            return Err(os_error(call, self.len));
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a forked child a range kept from it is a hole, perhaps mapped by someone else by now.
        if !self.guard.is_forked() {
            trim(self.base.as_ptr(), self.len);
        }
    }
}

/// Drops the pages of a file mapping; they come back from the file when touched.
///
/// # Safety
/// `start..start + len` has to be a private file mapping without modified pages.
pub(crate) unsafe fn drop_file_pages(start: usize, len: usize) -> io::Result<()> {
    let address = std::ptr::with_exposed_provenance_mut::<c_void>(start);
    // SAFETY: forwarded to the caller: unmodified file pages read the same after they fault back.
    let status = unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes the hole that a failed `mremap` leaves where it had already unmapped its target. Where it had
/// not, the target is still mapped and the call changes nothing.
fn refill(target: *mut c_void, len: usize) {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE refuses to touch an existing mapping.
    let start = unsafe { libc::mmap(target, len, libc::PROT_NONE, flags, -1, 0) };
    // Kernels before 4.17 take the address as a hint only; MREMAP_DONTUNMAP needs 5.7.
    debug_assert!(start == target || start == libc::MAP_FAILED);
}

/// Unmaps pages of a range that is being made or dropped by its only owner.
fn trim(start: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the caller is the only owner of the range and gives up its address here.
        let status = unsafe { libc::munmap(start.cast(), len) };
        debug_assert_eq!(status, 0, "munmap: {}", io::Error::last_os_error());
    }
}

fn os_error(call: &'static str, bytes: usize) -> MemoryError {
    MemoryError::Os {
        call,
        bytes,
        source: io::Error::last_os_error(),
    }
}

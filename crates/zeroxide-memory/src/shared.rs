//! Memory that several processes of one host see: anonymous files without a name, so that nothing is left behind
//! whichever way the processes end.
#![expect(
    unsafe_code,
    reason = "system calls, and memory that other processes write"
)]

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use zeroxide_layout::{PAGE, checked_align_up_usize};

use crate::map::Mapping;
use crate::{Lease, MemoryError};

const WORD: usize = size_of::<u64>();

/// A stretch of memory shared between processes: words that are only touched atomically, then payload.
///
/// The process that makes it hands `pid` and [`descriptor`](Self::descriptor) to the others, which
/// [`open`](Self::open) it. It lives as long as some process has it mapped.
#[derive(Debug)]
pub struct SharedSegment {
    file: File,
    mapping: Mapping,
    words: usize,
    payload: usize,
    start: usize,
}

impl SharedSegment {
    /// Makes a segment of `words` words, all zero, and `payload` bytes. Memory is used only where it is written.
    ///
    /// # Errors
    /// [`MemoryError::InvalidRequest`] for nothing at all, [`MemoryError::Os`].
    pub fn create(words: usize, payload: usize) -> Result<Self, MemoryError> {
        let (start, whole) = sizes(words, payload)?;
        // SAFETY: the name is a C string, and the call makes a new descriptor.
        let descriptor = unsafe {
            libc::memfd_create(
                c"zeroxide".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        if descriptor < 0 {
            return Err(failed("memfd_create (shared memory)", whole));
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(descriptor) };
        // Anonymous files are made open to everybody. The ranks that open it are the same user's.
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(|source| MemoryError::Os {
                call: "fchmod (shared memory)",
                bytes: whole,
                source,
            })?;
        file.set_len(whole as u64)
            .map_err(|source| MemoryError::Os {
                call: "ftruncate (shared memory)",
                bytes: whole,
                source,
            })?;
        // A segment that shrank would kill whoever touches the missing part.
        // SAFETY: adds seals to a descriptor of ours.
        let sealed = unsafe {
            libc::fcntl(
                file.as_raw_fd(),
                libc::F_ADD_SEALS,
                libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
            )
        };
        if sealed < 0 {
            return Err(failed("fcntl (seal shared memory)", whole));
        }
        Self::map(file, words, payload, start, whole)
    }

    /// Opens the segment that process `pid` of this host made, with the sizes it was made with.
    ///
    /// # Errors
    /// [`MemoryError::Os`] when that process or its descriptor cannot be reached,
    /// [`MemoryError::InvalidRequest`] when the sizes are others.
    pub fn open(
        pid: u32,
        descriptor: i32,
        words: usize,
        payload: usize,
    ) -> Result<Self, MemoryError> {
        let (start, whole) = sizes(words, payload)?;
        let outcome = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/fd/{descriptor}"))
            .and_then(|file| Ok((file.metadata()?.len(), file)));
        let (found, file) = outcome.map_err(|source| MemoryError::Os {
            call: "open (another rank's shared memory)",
            bytes: whole,
            source,
        })?;
        if found != whole as u64 {
            return Err(MemoryError::InvalidRequest {
                what: "shared memory of another rank",
                got: usize::try_from(found).unwrap_or(usize::MAX),
                expected: "the size that this rank computes",
            });
        }
        Self::map(file, words, payload, start, whole)
    }

    fn map(
        file: File,
        words: usize,
        payload: usize,
        start: usize,
        whole: usize,
    ) -> Result<Self, MemoryError> {
        let mapping = Mapping::reserve(whole)?;
        // SAFETY: the range is new, nobody has its address yet.
        unsafe { mapping.commit_shared(whole, &file, 0) }?;
        Ok(Self {
            file,
            mapping,
            words,
            payload,
            start,
        })
    }

    /// The number by which other processes find the segment under `/proc`.
    pub fn descriptor(&self) -> i32 {
        self.file.as_raw_fd()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where the payload starts in the file, in bytes.
    pub(crate) fn payload_offset(&self) -> usize {
        self.start
    }

    /// Bytes of payload.
    pub fn payload(&self) -> usize {
        self.payload
    }

    /// Word `index`.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        let address = self.mapping.base().as_ptr().wrapping_add(index * WORD);
        // SAFETY: inside the mapping and aligned; the words are touched atomically only, by every process.
        unsafe { AtomicU64::from_ptr(address.cast()) }
    }

    /// The lower half of word `index`, for waiting: a futex has 32 bits. Such a word is used in no other way.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn futex(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.words, "word {index} of {}", self.words);
        let address = self.mapping.base().as_ptr().wrapping_add(index * WORD);
        // SAFETY: inside the mapping and aligned; the words are touched atomically only, by every process.
        unsafe { AtomicU32::from_ptr(address.cast()) }
    }

    /// Leases `range` (bytes of the payload).
    ///
    /// # Safety
    /// Until the lease is gone, no other lease on the range is made in this process, and no other process writes it;
    /// none reads it while this one writes.
    ///
    /// # Panics
    /// When the range is not inside the payload.
    pub unsafe fn lease(self: &Arc<Self>, range: Range<usize>) -> Lease {
        assert!(
            range.start <= range.end && range.end <= self.payload,
            "{range:?} of {} bytes",
            self.payload
        );
        let address = self
            .mapping
            .base()
            .as_ptr()
            .wrapping_add(self.start + range.start);
        // SAFETY: shared memory is always initialised, the segment keeps it mapped, and the caller keeps others away.
        unsafe { Lease::foreign(address, range.len(), Arc::<Self>::clone(self)) }
    }

    /// Gives the pages wholly inside `range` (bytes of the payload) back; its bytes are undefined afterwards.
    ///
    /// # Errors
    /// [`MemoryError::Os`].
    ///
    /// # Safety
    /// No lease on the range is alive, in any process.
    pub unsafe fn discard(&self, range: Range<usize>) -> Result<(), MemoryError> {
        let start = (self.start + range.start).next_multiple_of(PAGE);
        let end = (self.start + range.end) / PAGE * PAGE;
        if start >= end {
            return Ok(());
        }
        // SAFETY: changes only bytes that nobody refers to, as the caller promises.
        let status = unsafe {
            libc::fallocate(
                self.file.as_raw_fd(),
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset(start),
                offset(end - start),
            )
        };
        if status == 0 {
            Ok(())
        } else {
            Err(failed("fallocate (give shared memory back)", end - start))
        }
    }
}

fn offset(bytes: usize) -> libc::off_t {
    libc::off_t::try_from(bytes).expect("sizes were checked against file offsets")
}

/// (start of the payload, bytes of everything)
fn sizes(words: usize, payload: usize) -> Result<(usize, usize), MemoryError> {
    let invalid = MemoryError::InvalidRequest {
        what: "shared memory",
        got: payload,
        expected: "more than 0, less than the largest file",
    };
    let start = words
        .checked_mul(WORD)
        .and_then(|bytes| checked_align_up_usize(bytes, PAGE));
    let whole = start
        .and_then(|start| start.checked_add(payload))
        .and_then(|bytes| checked_align_up_usize(bytes, PAGE))
        .filter(|bytes| *bytes > 0 && libc::off_t::try_from(*bytes).is_ok());
    match (start, whole) {
        (Some(start), Some(whole)) => Ok((start, whole)),
        _ => Err(invalid),
    }
}

fn failed(call: &'static str, bytes: usize) -> MemoryError {
    MemoryError::Os {
        call,
        bytes,
        source: io::Error::last_os_error(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_see_the_same_words_and_bytes() {
        let ours = Arc::new(SharedSegment::create(3, 10_000).unwrap());
        let pid = std::process::id();
        let theirs = Arc::new(SharedSegment::open(pid, ours.descriptor(), 3, 10_000).unwrap());
        ours.word(2).store(7, Ordering::Release);
        assert_eq!(theirs.word(2).load(Ordering::Acquire), 7);
        // SAFETY: the only lease on the range at this moment.
        let mut written = unsafe { ours.lease(5_000..10_000) };
        written.fill(9);
        drop(written);
        // SAFETY: the lease above is gone.
        let read = unsafe { theirs.lease(5_000..10_000) };
        assert!(read.iter().all(|byte| *byte == 9));
    }

    #[test]
    fn nobody_else_may_open_it() {
        let ours = SharedSegment::create(1, 4096).unwrap();
        let mode = ours.file().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }

    #[test]
    fn another_size_and_a_missing_process_are_refused() {
        let ours = SharedSegment::create(1, 4096).unwrap();
        let pid = std::process::id();
        assert!(SharedSegment::open(pid, ours.descriptor(), 1, 40_960).is_err());
        assert!(SharedSegment::open(u32::MAX, 3, 1, 4096).is_err());
        assert!(SharedSegment::create(0, 0).is_err());
    }

    #[test]
    fn discarded_pages_read_as_zero() {
        let segment = Arc::new(SharedSegment::create(1, 3 * PAGE).unwrap());
        // SAFETY: the only lease.
        unsafe { segment.lease(0..3 * PAGE) }.fill(1);
        // SAFETY: no lease is alive.
        unsafe { segment.discard(10..2 * PAGE) }.unwrap();
        // SAFETY: the only lease.
        let bytes = unsafe { segment.lease(0..3 * PAGE) };
        assert_eq!(
            bytes[PAGE - 1],
            1,
            "a page that is only partly inside stays"
        );
        assert!(bytes[PAGE..2 * PAGE].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[2 * PAGE], 1);
    }
}

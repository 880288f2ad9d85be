//! What goes into a queue and what comes out of it.

use std::fmt;
use std::sync::Arc;

use zeroxide_memory::Lease;

use super::reply::Reply;
use crate::error::StorageError;
use crate::file::{DIRECT_ALIGN, DiskFile};

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// One transfer between the whole of `buffer` and `file` at `offset`.
pub struct Operation {
    /// The direction.
    pub kind: OpKind,
    /// The file, kept open until the operation is answered.
    pub file: Arc<DiskFile>,
    /// Where the transfer begins in the file, in bytes.
    pub offset: u64,
    /// The memory; it belongs to the queue until the completion brings it back.
    pub buffer: Lease,
    /// Returned unchanged in the completion.
    pub tag: u64,
    /// The unit whose bytes these are, for who records what the queue does.
    pub unit: Option<usize>,
    /// Where the completion goes. When its receiver is gone the buffer is released on completion.
    pub reply: Reply,
}

impl Operation {
    /// Refuses what could never succeed, before it reaches an engine.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        let length = self.buffer.len();
        let end = self.offset.checked_add(length as u64);
        if length == 0 || end.is_none_or(|end| end > self.file.bytes()) {
            return Err(StorageError::OutOfRange {
                op: self.kind,
                path: self.file.path().to_path_buf(),
                offset: self.offset,
                length,
                bytes: self.file.bytes(),
            });
        }
        let address = self.buffer.as_ptr().addr();
        let aligned = self.offset.is_multiple_of(DIRECT_ALIGN as u64)
            && length.is_multiple_of(DIRECT_ALIGN)
            && address.is_multiple_of(DIRECT_ALIGN);
        if self.file.is_direct() && !aligned {
            return Err(StorageError::Misaligned {
                op: self.kind,
                path: self.file.path().to_path_buf(),
                offset: self.offset,
                length,
                address,
                align: DIRECT_ALIGN,
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operation")
            .field("kind", &self.kind)
            .field("path", &self.file.path())
            .field("offset", &self.offset)
            .field("length", &self.buffer.len())
            .field("tag", &self.tag)
            .finish_non_exhaustive()
    }
}

/// The answer to an operation, with its buffer.
///
/// After a failed read the contents of the buffer are unspecified; after a failed write those of the
/// file range are.
#[must_use = "the result must be checked and the buffer taken back"]
pub struct Completion {
    /// The tag of the operation.
    pub tag: u64,
    /// Its direction.
    pub kind: OpKind,
    /// Its buffer.
    pub buffer: Lease,
    /// Whether every byte was transferred.
    pub result: Result<(), StorageError>,
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("tag", &self.tag)
            .field("kind", &self.kind)
            .field("length", &self.buffer.len())
            .field("result", &self.result)
            .finish_non_exhaustive()
    }
}

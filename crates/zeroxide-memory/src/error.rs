//! What can go wrong with host memory.

use std::io;

use thiserror::Error;

use crate::{Bucket, Forked, WindowState};

/// A request for memory that was refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The budget's limit would be exceeded. Nothing was reserved.
    #[error(
        "host memory budget: {need} bytes for {} do not fit, {used} of {limit} bytes are in use; \
         raise the limit by {} bytes or offload more",
        bucket.name(), used.saturating_add(*need).saturating_sub(*limit)
    )]
    OverBudget {
        /// The bucket the bytes were asked for.
        bucket: Bucket,
        /// Bytes asked for.
        need: u64,
        /// Bytes in use over all buckets.
        used: u64,
        /// The limit over all buckets, in bytes.
        limit: u64,
    },
    /// No hole of the arena is large enough.
    #[error(
        "arena exhausted: need {need} bytes aligned to {align}, {free} free, largest hole {largest}"
    )]
    Exhausted {
        /// Bytes asked for.
        need: usize,
        /// Alignment asked for, in bytes.
        align: usize,
        /// Free bytes in all holes together.
        free: usize,
        /// Bytes of the largest hole.
        largest: usize,
    },
    /// A size or alignment that no request may have.
    #[error("{what}: {got} bytes; expected {expected}")]
    InvalidRequest {
        /// What was asked for.
        what: &'static str,
        /// The number given, in bytes.
        got: usize,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A range that does not lie inside its window.
    #[error("range {start}..{end} is empty or outside a window of {len} bytes")]
    OutOfRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Bytes of the window.
        len: usize,
    },
    /// Another lease holds a part of the range.
    #[error("range {start}..{end} overlaps a live lease; wait for its operation to complete")]
    RangeBusy {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// Memory under the window cannot change while an operation owns a part of it.
    #[error("cannot {operation} the window: {bytes} bytes are leased to operations in flight")]
    LeasesAlive {
        /// What was asked for.
        operation: &'static str,
        /// Leased bytes.
        bytes: usize,
    },
    /// The window's state does not allow the operation.
    #[error("cannot {operation} a window that is {state}; expected {expected}")]
    WrongState {
        /// What was asked for.
        operation: &'static str,
        /// The state it was asked in.
        state: WindowState,
        /// The states that allow it.
        expected: &'static str,
    },
    /// The frames do not cover the window exactly.
    #[error("window needs {need} frames, got {got}")]
    FrameCount {
        /// Frames that cover the window.
        need: usize,
        /// Frames given.
        got: usize,
    },
    /// The object belongs to another process.
    #[error(
        "memory was created in process {created} and used in its forked child {current}; create it after the fork"
    )]
    Forked {
        /// Process that made the object.
        created: u32,
        /// Process that used it.
        current: u32,
    },
    /// The operating system refused.
    #[error("{call} of {bytes} bytes failed: {source}")]
    Os {
        /// The system call and what it was for.
        call: &'static str,
        /// Bytes concerned.
        bytes: usize,
        /// The operating system's reason.
        source: io::Error,
    },
}

impl From<Forked> for MemoryError {
    fn from(Forked { created, current }: Forked) -> Self {
        Self::Forked { created, current }
    }
}

//! The I/O queue: one trait, three engines.
//!
//! | engine | how it waits | when |
//! |---|---|---|
//! | `uring` | one thread, one ring, up to `depth` transfers in the kernel | the kernel allows `io_uring` |
//! | `threads` | a few threads, one blocking transfer each | containers that refuse `io_uring` |
//! | `simulated` | one thread, seeded delays and faults | tests |
//!
//! ```text
//! submit -> admission checks -> Inbox (FIFO) -> engine -> Transfer: resubmit until whole -> Completion
//! ```
//!
//! No order is promised between operations in flight: whoever needs a write to precede a read of the
//! same bytes waits for its completion.

mod counters;
mod inbox;
mod journal;
mod notify;
mod operation;
mod reply;
#[expect(unsafe_code, reason = "the kernel is handed raw pointers into leases")]
mod ring;
mod simulated;
mod threads;
mod transfer;
mod uring;
mod wake;

use std::sync::Arc;

use zeroxide_memory::Recorder;

use crate::error::StorageError;
use crate::file::DiskFile;

pub use counters::{IoCounters, KindCounters};
pub use journal::{Journal, JournalEntry};
pub use notify::Notify;
pub use operation::{Completion, OpKind, Operation};
pub use reply::Reply;
pub use simulated::{Fault, FaultRule, SimBacking, SimOptions, Trigger};

use simulated::SimulatedQueue;
use threads::ThreadQueue;
use uring::UringQueue;

/// The greatest queue depth.
pub const MAX_DEPTH: usize = 4096;

/// Moves buffers to and from files, asynchronously.
///
/// Dropping the last reference closes the queue.
pub trait Queue: Send + Sync {
    /// Hands an operation over. Every accepted operation is answered by exactly one [`Completion`] on
    /// its `reply` channel, in no particular order.
    ///
    /// # Errors
    ///
    /// The operation comes back, buffer included, with [`StorageError::OutOfRange`] or
    /// [`StorageError::Misaligned`] when it could never succeed, with [`StorageError::Closed`] after
    /// [`close`](Self::close), and with [`StorageError::Forked`] in a forked child.
    #[expect(
        clippy::result_large_err,
        reason = "the operation moves back to its owner; boxing it would allocate on every refusal"
    )]
    fn submit(&self, operation: Operation) -> Result<(), (StorageError, Operation)>;

    /// Totals since the queue was opened; all zero in a forked child.
    fn counters(&self) -> IoCounters;

    /// The engine, its parameters, and why it was chosen, in one line.
    fn describe(&self) -> String;

    /// Makes all writes to `file` that have been answered survive a power cut. Waits for the disk.
    ///
    /// # Errors
    ///
    /// [`StorageError::File`]: whatever was written since the last success may be lost, and no later success says
    /// otherwise.
    fn sync(&self, file: &DiskFile) -> Result<(), StorageError> {
        file.sync()
    }

    /// What records acts on the disk, where it is a simulated one that does.
    fn journal(&self) -> Option<&Journal> {
        None
    }

    /// Stops taking operations, answers those that have not started with [`StorageError::Closed`],
    /// and returns when everything in flight has been answered. Does nothing when repeated, or in a
    /// forked child.
    fn close(&self);
}

/// Which engine runs a queue.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineKind {
    /// `io_uring` where the kernel allows it, else threads; [`Queue::describe`] tells which and why.
    Auto,
    /// `io_uring`, or [`StorageError::IoUringRefused`].
    IoUring,
    /// A pool of threads.
    Threads,
    /// A simulated disk with delays and faults, for tests.
    Simulated(SimOptions),
}

/// What may be tuned in a queue beside its depth.
#[derive(Debug, Clone)]
pub struct QueueOptions {
    /// Threads of the thread engine.
    pub workers: usize,
    /// When set, `io_uring` is treated as refused for this reason, as containers and hardened kernels
    /// refuse it. A user sets it to keep `io_uring` out of a process; tests set it to see what follows.
    pub refuse_io_uring: Option<String>,
    /// Records every transfer from when it is accepted to its answer, while it is on.
    pub recorder: Recorder,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self {
            workers: 4,
            refuse_io_uring: None,
            recorder: Recorder::default(),
        }
    }
}

/// Opens a queue with at most `depth` transfers in the kernel at a time.
///
/// # Errors
///
/// See [`open_queue_with`].
pub fn open_queue(kind: EngineKind, depth: usize) -> Result<Arc<dyn Queue>, StorageError> {
    open_queue_with(kind, depth, &QueueOptions::default())
}

/// Opens a queue with at most `depth` transfers in the kernel at a time and the given options.
///
/// # Errors
///
/// [`StorageError::Depth`] when `depth` or the number of workers is not in 1 to [`MAX_DEPTH`],
/// [`StorageError::IoUringRefused`] when `io_uring` was asked for by name and is not to be had,
/// [`StorageError::Engine`] when no thread can be started.
pub fn open_queue_with(
    kind: EngineKind,
    depth: usize,
    options: &QueueOptions,
) -> Result<Arc<dyn Queue>, StorageError> {
    for count in [depth, options.workers] {
        if count == 0 || count > MAX_DEPTH {
            return Err(StorageError::Depth {
                depth: count,
                max: MAX_DEPTH,
            });
        }
    }
    let workers = options.workers.min(depth);
    let recorder = options.recorder.clone();
    match kind {
        EngineKind::IoUring => Ok(Arc::new(open_uring(depth, options)?)),
        EngineKind::Threads => Ok(Arc::new(ThreadQueue::open(workers, "asked for", recorder)?)),
        EngineKind::Simulated(simulation) => {
            Ok(Arc::new(SimulatedQueue::open(simulation, depth, recorder)?))
        }
        EngineKind::Auto => match open_uring(depth, options) {
            Ok(queue) => Ok(Arc::new(queue)),
            Err(StorageError::IoUringRefused { reason }) => {
                let why = format!("io_uring refused: {reason}");
                Ok(Arc::new(ThreadQueue::open(workers, &why, recorder)?))
            }
            Err(other) => Err(other),
        },
    }
}

fn open_uring(depth: usize, options: &QueueOptions) -> Result<UringQueue, StorageError> {
    match &options.refuse_io_uring {
        Some(reason) => Err(StorageError::IoUringRefused {
            reason: reason.clone(),
        }),
        None => UringQueue::open(depth, options.recorder.clone()),
    }
}

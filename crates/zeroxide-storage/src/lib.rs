//! The disk tier: an asynchronous I/O queue and the block store on top of it.
//!
//! * A [`Queue`] moves [`Lease`](zeroxide_memory::Lease)s to and from [`DiskFile`]s. It has three
//!   engines: `io_uring`, a pool of threads, and a simulated one that injects faults. One conformance
//!   suite runs over all three.
//! * A [`BlockStore`] gives every block of training state preallocated tiles in one or more
//!   directories, a lock against a second run, a checksum for every tile, and a generation number.
//!
//! ```text
//!  caller --Operation{buffer}--> Queue --> kernel --> disk
//!         <--Completion{buffer, result}--
//! ```
//!
//! Rules that hold everywhere:
//!
//! * A buffer moves into an operation and comes back in its [`Completion`], or with the error when the
//!   operation is not accepted. Every accepted operation is answered exactly once.
//! * Memory that the kernel may still touch is never released: an engine reaps everything in flight
//!   before it goes, also when it is dropped or panics.
//! * Every completion is checked for an error and for its length; the caller sees a whole transfer or a
//!   [`StorageError`] that names file, offset, and length.
//! * Unsafe code is confined to `syscall.rs` and `queue/ring.rs`.

#![deny(unsafe_code)]

mod error;
mod file;
mod measure;
mod private;
mod queue;
mod store;
mod sync;
#[expect(
    unsafe_code,
    reason = "the system calls that the standard library lacks"
)]
mod syscall;

pub use error::{Difference, Holder, StorageError};
pub use file::{DIRECT_ALIGN, DiskFile};
pub use measure::{DiskSpeed, Pass, measure_disk};
pub use queue::{
    Completion, EngineKind, Fault, FaultRule, IoCounters, Journal, JournalEntry, KindCounters,
    MAX_DEPTH, Notify, OpKind, Operation, Queue, QueueOptions, Reply, SimBacking, SimOptions,
    Trigger, open_queue, open_queue_with,
};
pub use store::{
    BlockSpec, BlockStore, CHECKSUM_PIECE, Commit, Durable, Pin, RunningChecksum, StoreOptions,
    checksum, join_checksums,
};

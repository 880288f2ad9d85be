//! Host memory: byte budgets, arenas that lease ranges, and windows under which physical pages move.
//!
//! Every payload byte of a run lives in memory made here and is counted in exactly one [`Bucket`] of a
//! [`Budget`]. Four shapes of memory cover the needs of a step:
//!
//! - [`Arena`]: one mapping, leased in ranges. A [`Lease`] is the unique owner of its range and moves
//!   into an operation and back out of it.
//! - [`FramePool`]: physical memory in frames of 2 MiB that no one can touch until it is mapped.
//! - [`Window`]: a fixed address range for one unit's flat weights. Frames are moved under it while the
//!   unit is gathered; otherwise a stray access faults.
//! - [`SharedSegment`]: memory that the ranks of one host see in common.
//!
//! A [`Recorder`] keeps what a process did and when, in memory of a budget, too.
//!
//! Objects made here belong to the process that made them. In a forked child their operations return
//! [`MemoryError::Forked`] and dropping them does nothing.

#![deny(unsafe_code)]

mod allocator;
mod arena;
mod budget;
mod error;
mod fault;
mod fork;
mod frames;
mod free_list;
mod lease;
mod map;
mod mapped;
mod moment;
mod recorder;
mod region;
mod resident;
mod shared;
mod window;

pub use allocator::{heap_bytes, keep_freed_memory};
pub use arena::Arena;
pub use budget::{Bucket, Budget, Reservation, Usage};
pub use error::MemoryError;
pub use fault::FaultNet;
pub use fork::{ForkGuard, Forked};
pub use frames::{FRAME, Frame, FramePool};
pub use lease::{Lease, Pod};
pub use mapped::drop_pages_of_files;
pub use recorder::{Activity, Begun, Event, Recorder, Recording};
pub use resident::{Resident, drop_clean_text, reset_peak, resident_bytes};
pub use shared::SharedSegment;
pub use window::{Anchor, Window, WindowState};

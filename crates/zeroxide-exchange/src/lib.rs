//! What the ranks of one host say to one another through shared memory.
//!
//! Each rank has one segment: words that say how far it is, and room for gradients on their way to the other ranks. A
//! rank writes only its own segment. [`SharedMemoryReducer`] is the protocol: who may read or write which bytes
//! follows from the words, which are stored after what they announce and loaded before what depends on them. Its calls
//! never wait: what another rank has to do first is a [`PeerWait`], which needs no lock of the caller's.

#![deny(unsafe_code)]

mod cancel;
mod error;
mod futex;
mod peers;
mod shm_reduce;
mod word;

pub use cancel::CancelToken;
pub use error::{ExchangeError, Result};
pub use peers::PeerWait;
pub use shm_reduce::{ReducerPlan, SegmentHandle, SharedMemoryReducer};

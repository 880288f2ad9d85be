//! What threads take turns with: the standard library's here, and in tests that explore schedules what their scheduler
//! knows.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
pub(crate) use std::sync::{Arc, Mutex, PoisonError, Weak};
pub(crate) use std::thread::{Builder, JoinHandle};

pub(crate) use zeroxide_storage::Notify;

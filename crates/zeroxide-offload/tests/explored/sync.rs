//! What threads take turns with, as the scheduler knows it.

pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
pub(crate) use shuttle::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
pub(crate) use shuttle::thread::{Builder, JoinHandle};

pub(crate) use crate::notify::Notify;

//! What threads wait with: the standard library's here, and in tests that explore schedules what their scheduler knows.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

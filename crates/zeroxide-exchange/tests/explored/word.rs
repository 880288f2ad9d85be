//! Words of shared memory at which the scheduler may let another rank go on. They are the real ones.

use std::sync::atomic::{AtomicU64, Ordering};

use shuttle::sync::atomic::AtomicBool;

/// A point at which another rank may go on.
pub(crate) fn step() {
    AtomicBool::new(false).load(Ordering::SeqCst);
}

pub(crate) fn read(word: &AtomicU64) -> u64 {
    step();
    word.load(Ordering::SeqCst)
}

pub(crate) fn own(word: &AtomicU64) -> u64 {
    word.load(Ordering::SeqCst)
}

pub(crate) fn say(word: &AtomicU64, value: u64) {
    step();
    word.store(value, Ordering::SeqCst);
}

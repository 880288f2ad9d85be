//! A word of shared memory: one rank writes it, all read it.

use std::sync::atomic::{AtomicU64, Ordering};

/// What the word says, and to whoever sees that also all that its rank had written before.
pub(crate) fn read(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

/// What this rank itself has said last in a word of its own.
pub(crate) fn own(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

/// Says `value`, after all that this rank has written before.
pub(crate) fn say(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Release);
}

//! Sleeping until another process rings: a futex on a word of shared memory.
#![expect(unsafe_code, reason = "the futex system call")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Looks before the first sleep: an answer is often a few microseconds away.
pub(crate) const SPINS: u32 = 200;

/// What the word reads, to be told apart from what it reads once it has been woken.
pub(crate) fn read(word: &AtomicU32) -> u32 {
    word.load(Ordering::Acquire)
}

/// Wakes whoever sleeps on `word`, in any process.
pub(crate) fn wake(word: &AtomicU32) {
    word.fetch_add(1, Ordering::Release);
    // SAFETY: FUTEX_WAKE reads no memory of ours beyond the word's address, which the reference keeps valid.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE,
            i32::MAX,
            std::ptr::null::<libc::timespec>(),
        )
    };
}

/// Sleeps until `word` is woken, at most `longest`; returns at once when it no longer reads `seen`.
pub(crate) fn wait(word: &AtomicU32, seen: u32, longest: Duration) {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(longest.as_secs()).unwrap_or(1),
        tv_nsec: libc::c_long::from(longest.subsec_nanos()),
    };
    // SAFETY: FUTEX_WAIT compares the word and sleeps; word and timeout outlive the call. Any return, also an early or
    // refused one, only makes the caller look again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
        )
    };
}

//! When and on which thread a call is made, in the system's own numbers: a program in another language in the same
//! process reads the same clock and the same thread ids.
#![expect(
    unsafe_code,
    reason = "asks the system for its clock and for the thread"
)]

use std::cell::Cell;

/// Nanoseconds of the system's monotonic clock, `CLOCK_MONOTONIC` of `clock_gettime(2)`: what Python's
/// `time.monotonic_ns()` counts on Linux.
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a `timespec` of this frame, which the call fills and does not keep.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    debug_assert_eq!(failed, 0, "every Linux has this clock");
    let count = |value: i64| u64::try_from(value).unwrap_or(0);
    count(now.tv_sec) * 1_000_000_000 + count(now.tv_nsec)
}

/// The system's number of the calling thread: what Python's `threading.get_native_id()` tells.
pub(crate) fn thread_id() -> u32 {
    thread_local! {
        static ID: Cell<u32> = const { Cell::new(0) };
    }
    ID.with(|known| {
        if known.get() == 0 {
            // SAFETY: the call takes nothing and cannot fail, see gettid(2).
            let id = unsafe { libc::gettid() };
            known.set(u32::try_from(id).unwrap_or(0));
        }
        known.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_the_one_that_the_standard_library_reads() {
        let start = (std::time::Instant::now(), monotonic_ns());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let told = monotonic_ns() - start.1;
        let elapsed = start.0.elapsed();
        assert!(told >= 20_000_000, "{told}");
        assert!(u128::from(told) <= elapsed.as_nanos(), "{told} {elapsed:?}");
    }

    #[test]
    fn each_thread_has_an_id_of_its_own() {
        let here = thread_id();
        let there = std::thread::spawn(thread_id).join().expect("it returns");
        assert_eq!(here, thread_id());
        assert_ne!(here, there);
    }
}

//! Sleeping that the scheduler knows of. No sleep runs out by itself before time passes, so that one which nobody ends is
//! seen.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shuttle::sync::{Condvar, Mutex};

use crate::word::step;

pub(crate) const SPINS: u32 = 1;

shuttle::lazy_static! {
    static ref TIME_PASSES: Mutex<bool> = Mutex::new(false);
    static ref WOKEN: Condvar = Condvar::new();
}

pub(crate) fn read(word: &AtomicU32) -> u32 {
    step();
    word.load(Ordering::SeqCst)
}

pub(crate) fn wake(word: &AtomicU32) {
    step();
    word.fetch_add(1, Ordering::SeqCst);
    // All look at their words again: that they share one condition is nothing which they rely on.
    let _time = TIME_PASSES.lock().expect("nobody panics under it");
    WOKEN.notify_all();
}

/// As the system call: returns at once where the word has changed, which it looks at with the sleepers' lock held.
pub(crate) fn wait(word: &AtomicU32, seen: u32, _longest: Duration) {
    let mut passes = TIME_PASSES.lock().expect("nobody panics under it");
    while word.load(Ordering::SeqCst) == seen && !*passes {
        passes = WOKEN.wait(passes).expect("nobody panics under it");
    }
}

/// From here on sleeps run out.
pub(crate) fn let_time_pass() {
    *TIME_PASSES.lock().expect("nobody panics under it") = true;
    WOKEN.notify_all();
}

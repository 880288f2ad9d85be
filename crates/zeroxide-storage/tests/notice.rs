//! A notice to a thread, which is kept until that thread has waited for it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use zeroxide_storage::Notify;

/// Catches: a notice lost because nobody waited when it came, and one that is counted twice.
#[test]
fn a_notice_is_kept_until_it_is_waited_for() {
    let notify = Arc::new(Notify::default());
    notify.notify_one();
    notify.notify_one();
    assert!(notify.wait());
    let waiter = Arc::clone(&notify);
    let thread = thread::spawn(move || waiter.wait());
    thread::sleep(Duration::from_millis(20));
    assert!(!thread.is_finished(), "two notices before one wait are one");
    notify.close();
    assert!(!thread.join().expect("waits without a panic"));
    notify.notify_one();
    assert!(!notify.wait(), "closed for good");
}

//! Where completions go, and who is told that they have come.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::operation::Completion;

/// The way from a queue to whoever takes its completions.
#[derive(Clone)]
pub struct Reply {
    channel: Sender<Completion>,
    notify: Option<Arc<Notify>>,
}

impl Reply {
    /// Tells `notify` of every completion: for a thread that has more to look at than the channel.
    pub const fn notifying(channel: Sender<Completion>, notify: Arc<Notify>) -> Self {
        Self {
            channel,
            notify: Some(notify),
        }
    }

    /// Sends the completion. A receiver that is gone wants none; the buffer then goes back to where it came from.
    pub(super) fn send(&self, completion: Completion) {
        let _ = self.channel.send(completion);
        if let Some(notify) = &self.notify {
            notify.notify_one();
        }
    }
}

impl From<Sender<Completion>> for Reply {
    fn from(channel: Sender<Completion>) -> Self {
        Self {
            channel,
            notify: None,
        }
    }
}

impl From<&Sender<Completion>> for Reply {
    fn from(channel: &Sender<Completion>) -> Self {
        Self::from(channel.clone())
    }
}

impl From<&Reply> for Reply {
    fn from(reply: &Reply) -> Self {
        reply.clone()
    }
}

/// Wakes one thread. A notice is kept until that thread has waited for it, so none is missed.
#[derive(Debug, Default)]
pub struct Notify {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Silent,
    Notified,
    /// For good.
    Closed,
}

impl Notify {
    /// Has the next wait, or the present one, return.
    pub fn notify_one(&self) {
        let mut state = self.lock();
        if *state == State::Silent {
            *state = State::Notified;
            self.changed.notify_one();
        }
    }

    /// Ends every present and later wait.
    pub fn close(&self) {
        *self.lock() = State::Closed;
        self.changed.notify_all();
    }

    /// Waits for a notice and takes it; false once closed.
    pub fn wait(&self) -> bool {
        let mut state = self.lock();
        loop {
            match *state {
                State::Closed => return false,
                State::Notified => {
                    *state = State::Silent;
                    return true;
                }
                State::Silent => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches: a notice lost because nobody waited when it came, and one that is counted twice.
    #[test]
    fn a_notice_is_kept_until_it_is_waited_for() {
        let notify = Arc::new(Notify::default());
        notify.notify_one();
        notify.notify_one();
        assert!(notify.wait());
        let waiter = Arc::clone(&notify);
        let thread = std::thread::spawn(move || waiter.wait());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!thread.is_finished(), "two notices before one wait are one");
        notify.close();
        assert!(!thread.join().expect("waits without a panic"));
        notify.notify_one();
        assert!(!notify.wait(), "closed for good");
    }
}

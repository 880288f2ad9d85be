//! Waking one thread for something that it then looks for itself.

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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

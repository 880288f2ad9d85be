//! The way into an engine: accepted operations in order, until the queue closes.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::counters::{IoCounters, Meter};
use super::operation::Operation;
use super::transfer::Transfer;
use zeroxide_memory::{ForkGuard, Recorder};

use crate::error::StorageError;

/// Shared by the handle of a queue and its engine threads.
pub(super) struct Inbox {
    guard: ForkGuard,
    meter: Arc<Meter>,
    state: Mutex<State>,
    /// Signalled when a transfer arrives and when the inbox closes.
    changed: Condvar,
}

enum State {
    /// Takes operations.
    Open(VecDeque<Transfer>),
    /// Refuses operations; holds nothing.
    Closed,
}

/// What [`Inbox::push`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// The inbox was empty: the engine may be asleep.
    First,
    /// The engine has been told of earlier arrivals that it has not taken yet.
    Behind,
}

/// What [`Inbox::wait`] found.
pub(super) enum Waited {
    /// A transfer.
    Transfer(Transfer),
    /// The time ran out.
    Nothing,
    /// The queue is closed.
    Closed,
}

impl Inbox {
    /// One whose transfers `recorder` records.
    pub(super) fn new(recorder: Recorder) -> Arc<Self> {
        Arc::new(Self {
            guard: ForkGuard::new(),
            meter: Arc::new(Meter::new(recorder)),
            state: Mutex::new(State::Open(VecDeque::new())),
            changed: Condvar::new(),
        })
    }

    /// Checks an operation and takes it in.
    #[expect(
        clippy::result_large_err,
        reason = "the operation moves back to its owner"
    )]
    pub(super) fn push(&self, operation: Operation) -> Result<Arrival, (StorageError, Operation)> {
        let here = self.guard.check_process().map_err(StorageError::from);
        if let Err(error) = here.and_then(|()| operation.check()) {
            return Err((error, operation));
        }
        match &mut *self.lock() {
            State::Closed => Err((StorageError::Closed, operation)),
            State::Open(waiting) => {
                let first = waiting.is_empty();
                waiting.push_back(Transfer::new(operation, &self.meter));
                self.changed.notify_one();
                Ok(if first {
                    Arrival::First
                } else {
                    Arrival::Behind
                })
            }
        }
    }

    /// Moves everything that waits to the end of `into`; returns whether the inbox is still open.
    pub(super) fn take_all(&self, into: &mut VecDeque<Transfer>) -> bool {
        match &mut *self.lock() {
            State::Closed => false,
            State::Open(waiting) => {
                into.append(waiting);
                true
            }
        }
    }

    /// Takes the next transfer, waiting for it at most `limit`, or for ever without one.
    pub(super) fn wait(&self, limit: Option<Duration>) -> Waited {
        let mut state = self.lock();
        loop {
            match &mut *state {
                State::Closed => return Waited::Closed,
                State::Open(waiting) => {
                    if let Some(transfer) = waiting.pop_front() {
                        return Waited::Transfer(transfer);
                    }
                }
            }
            state = match limit {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(limit) => {
                    let (state, timeout) = self
                        .changed
                        .wait_timeout(state, limit)
                        .unwrap_or_else(PoisonError::into_inner);
                    if timeout.timed_out() {
                        return Waited::Nothing;
                    }
                    state
                }
            };
        }
    }

    /// Refuses further operations and answers those that wait with [`StorageError::Closed`].
    pub(super) fn close(&self) {
        let before = std::mem::replace(&mut *self.lock(), State::Closed);
        self.changed.notify_all();
        // Answers are sent outside the lock, by the transfers' own drop.
        drop(before);
    }

    pub(super) fn guard(&self) -> ForkGuard {
        self.guard
    }

    /// The totals; zero in a forked child, where the lock may be held by a thread that is not there.
    pub(super) fn counters(&self) -> IoCounters {
        if self.guard.is_forked() {
            IoCounters::default()
        } else {
            self.meter.read()
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one assignment or one deque call, so a panic of another
        // holder cannot leave it half made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the inbox when an engine thread ends, also by a panic: later operations are then refused
/// instead of waiting for an engine that is gone.
pub(super) struct CloseOnExit(pub(super) Arc<Inbox>);

impl Drop for CloseOnExit {
    fn drop(&mut self) {
        self.0.close();
    }
}

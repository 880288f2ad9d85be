//! The thread that goes on with a step while nobody waits for it: under the next forward, and whatever follows.
//!
//! Whoever needs a unit still drives the step himself, and first: the thread takes the core's lock only while no call
//! is made, for one tile at a time, and never waits for the disk under it. What it does and when changes no number.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

use zeroxide_storage::Notify;

use crate::core::Core;
use crate::error::{OffloadError, Result};

/// The thread, and what keeps it out of the way of calls. Without a thread where no step outlives its call.
pub(crate) struct Driver {
    notify: Arc<Notify>,
    /// Calls that hold the core's lock or wait for it.
    callers: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A call: while there is one, the thread leaves the lock alone.
pub(crate) struct Call<'a> {
    driver: &'a Driver,
    /// Whether the call has left a step under way.
    pub(crate) stepping: bool,
}

impl Driver {
    /// A driver of the steps of `core`, which is that of `shared`.
    pub(crate) fn start(core: &Core, shared: Weak<Mutex<Option<Core>>>) -> Result<Self> {
        let notify = Arc::clone(&core.step.notify);
        let callers = Arc::new(AtomicUsize::new(0));
        let thread = if core.disk.is_some() || core.step.deferred {
            let (heard, others) = (Arc::clone(&notify), Arc::clone(&callers));
            let thread = std::thread::Builder::new()
                .name("zx-step".into())
                .spawn(move || run(&shared, &heard, &others))
                .map_err(|source| OffloadError::Misuse {
                    call: "new",
                    what: format!("the thread that goes on with steps did not start: {source}"),
                })?;
            Some(thread)
        } else {
            None
        };
        Ok(Self {
            notify,
            callers,
            thread: Mutex::new(thread),
        })
    }

    /// Keeps the thread away from the lock until the call ends.
    pub(crate) fn call(&self) -> Call<'_> {
        self.callers.fetch_add(1, Ordering::SeqCst);
        Call {
            driver: self,
            stepping: false,
        }
    }

    /// Ends the thread; the step stays where it is. Idempotent.
    pub(crate) fn end(&self) {
        self.notify.close();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of it has left the core's lock poisoned, which the next call says.
            let _ = thread.join();
        }
    }

    /// In a forked child, where the thread is not.
    pub(crate) fn forget(&mut self) {
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(thread.take());
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let last = self.driver.callers.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.stepping {
            self.driver.notify.notify_one();
        }
    }
}

/// Until the notify is closed or the core is gone.
fn run(shared: &Weak<Mutex<Option<Core>>>, notify: &Notify, callers: &AtomicUsize) {
    while notify.wait() {
        // The last call notifies when it ends.
        while callers.load(Ordering::SeqCst) == 0 {
            let Some(shared) = shared.upgrade() else {
                return;
            };
            let Ok(mut guard) = shared.lock() else {
                // A call has panicked: the state is not used again.
                return;
            };
            let Some(core) = guard.as_mut() else {
                return;
            };
            if !core.drive_ahead() {
                break;
            }
        }
    }
}

impl Core {
    /// Goes on with the step as far as that takes no waiting: by one tile at most. Returns whether more can be done at
    /// once. The next call that needs the state raises what went wrong.
    fn drive_ahead(&mut self) -> bool {
        if self.step.poisoned.is_some() || self.step.active.is_none() {
            return false;
        }
        let outcome = self.advance_ahead();
        match self.record_outcome(outcome) {
            Ok(more) => more,
            Err(error) => {
                if let Some(poison) = &self.step.poisoned {
                    poison.unraised.set(Some(error));
                }
                false
            }
        }
    }

    fn advance_ahead(&mut self) -> Result<bool> {
        self.note_completions()?;
        if self
            .step
            .active
            .as_ref()
            .is_some_and(super::stream::ActiveStep::is_updated)
        {
            self.retire_step()?;
            return Ok(false);
        }
        self.start_all_reads()?;
        self.update_oldest()
    }
}

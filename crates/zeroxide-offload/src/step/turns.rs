//! Whose turn it is with the state: calls come first, and a thread goes on with what they have left under way.
//!
//! The thread takes the lock of the state only while there is no call, for one turn at a time. The last call that ends
//! wakes it, whichever call it was that has left something to do; so does whoever completes what it waits for.

use std::io;

use crate::sync::{
    Arc, AtomicBool, AtomicUsize, Builder, JoinHandle, Mutex, Notify, Ordering, PoisonError, Weak,
};

/// What is gone on with.
pub(crate) trait Ahead: Send + 'static {
    /// Goes on without waiting, by one piece of work at most. Returns whether more can be done at once.
    fn go_ahead(&mut self) -> bool;
}

/// The thread, and what keeps it out of the way of calls.
pub(crate) struct Turns {
    notify: Arc<Notify>,
    calls: Arc<Calls>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The calls that hold the lock of the state or wait for it.
#[derive(Default)]
struct Calls {
    count: AtomicUsize,
    /// Whether the state had something under way when a call was last done with it. Written under the state's lock, so
    /// that it is what the last of them has left.
    under_way: AtomicBool,
}

/// A call: while there is one, the thread leaves the lock alone.
pub(crate) struct Call<'a> {
    turns: &'a Turns,
}

impl Turns {
    /// Without a thread: for a state that leaves nothing under way.
    pub(crate) fn alone(notify: Arc<Notify>) -> Self {
        Self {
            notify,
            calls: Arc::default(),
            thread: Mutex::new(None),
        }
    }

    /// A thread that goes on with `state` until [`end`](Self::end), or until the state is gone.
    ///
    /// # Errors
    /// Where the thread does not start.
    pub(crate) fn start<T: Ahead>(
        notify: Arc<Notify>,
        state: Weak<Mutex<Option<T>>>,
    ) -> io::Result<Self> {
        let turns = Self::alone(notify);
        let (heard, calls) = (Arc::clone(&turns.notify), Arc::clone(&turns.calls));
        let thread = Builder::new()
            .name("zx-step".into())
            .spawn(move || run(&state, &heard, &calls))?;
        *turns.thread() = Some(thread);
        Ok(turns)
    }

    /// Keeps the thread away from the lock until the call ends.
    pub(crate) fn call(&self) -> Call<'_> {
        self.calls.count.fetch_add(1, Ordering::SeqCst);
        Call { turns: self }
    }

    /// Ends the thread; what is under way stays where it is. Idempotent.
    pub(crate) fn end(&self) {
        self.notify.close();
        let thread = self.thread().take();
        if let Some(thread) = thread {
            // A panic of it has left the lock of the state poisoned, which the next call says.
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

    fn thread(&self) -> impl std::ops::DerefMut<Target = Option<JoinHandle<()>>> + '_ {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Call<'_> {
    /// The call is done with the state, whose lock it still holds, and leaves something `under_way` or nothing.
    pub(crate) fn leaves(&self, under_way: bool) {
        self.turns
            .calls
            .under_way
            .store(under_way, Ordering::SeqCst);
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let calls = &self.turns.calls;
        let last = calls.count.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && calls.under_way.load(Ordering::SeqCst) {
            self.turns.notify.notify_one();
        }
    }
}

/// Until the notify is closed or the state is gone.
fn run<T: Ahead>(state: &Weak<Mutex<Option<T>>>, notify: &Notify, calls: &Calls) {
    while notify.wait() {
        // The last call notifies when it ends.
        while calls.count.load(Ordering::SeqCst) == 0 {
            let Some(state) = state.upgrade() else {
                return;
            };
            let Ok(mut guard) = state.lock() else {
                // A call has panicked: the state is not used again.
                return;
            };
            let Some(state) = guard.as_mut() else {
                return;
            };
            if !state.go_ahead() {
                break;
            }
        }
    }
}

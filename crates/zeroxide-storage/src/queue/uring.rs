//! The `io_uring` engine: one thread that owns one ring.
//!
//! ```text
//! Sleeping in the kernel --wake event or completion--> take inbox, start up to `depth`, reap --> sleep
//! ```
//!
//! The thread sleeps only in [`Ring::wait`], where both a new operation (through the wake event) and a
//! completion rouse it; it never spins.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use zeroxide_memory::Recorder;

use super::counters::IoCounters;
use super::inbox::{Arrival, CloseOnExit, Inbox};
use super::operation::Operation;
use super::ring::{Event, Ring};
use super::transfer::Step;
use super::wake::Wake;
use super::{Queue, StorageError};

/// A queue served by an `io_uring`.
pub(super) struct UringQueue {
    inbox: Arc<Inbox>,
    wake: Arc<Wake>,
    thread: Mutex<Option<JoinHandle<()>>>,
    description: String,
}

impl UringQueue {
    /// Starts the engine thread and waits until it has its ring.
    pub(super) fn open(depth: usize, recorder: Recorder) -> Result<Self, StorageError> {
        let inbox = Inbox::new(recorder);
        let wake = Arc::new(Wake::new().map_err(|source| StorageError::Engine { source })?);
        let (ready, opened) = mpsc::channel();
        let thread = {
            let inbox = Arc::clone(&inbox);
            let wake = Arc::clone(&wake);
            // The ring is made on its thread: a single-issuer ring belongs to the thread that makes it.
            thread::Builder::new()
                .name("zx-io-uring".into())
                .spawn(move || match Ring::open(depth, wake) {
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                    Ok((ring, setup)) => {
                        let _ = ready.send(Ok(setup));
                        serve(ring, &inbox);
                    }
                })
                .map_err(|source| StorageError::Engine { source })?
        };
        match opened.recv() {
            Ok(Ok(setup)) => Ok(Self {
                inbox,
                wake,
                thread: Mutex::new(Some(thread)),
                description: format!("io_uring, depth {depth} ({setup})"),
            }),
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(mpsc::RecvError) => {
                let _ = thread.join();
                let source = io::Error::other("the engine thread ended before it had a ring");
                Err(StorageError::Engine { source })
            }
        }
    }
}

/// The life of the engine thread. On every way out `ring` is dropped, which waits for the kernel, and
/// before that the inbox refuses further operations.
fn serve(mut ring: Ring, inbox: &Arc<Inbox>) {
    let _guard = CloseOnExit(Arc::clone(inbox));
    let mut waiting = VecDeque::new();
    if ring.watch().is_err() {
        return;
    }
    loop {
        let open = inbox.take_all(&mut waiting);
        if !open {
            // What has not started is answered now; a transfer in flight is seen through, so that no
            // write is left half done.
            waiting.clear();
            if ring.is_idle() {
                return;
            }
        }
        while ring.has_room()
            && let Some(transfer) = waiting.pop_front()
        {
            if let Err(transfer) = ring.start(transfer) {
                waiting.push_front(transfer);
                break;
            }
        }
        if ring.wait().is_err() {
            return;
        }
        while let Some(event) = ring.next_event() {
            match event {
                Event::Woken => {
                    if ring.watch().is_err() {
                        return;
                    }
                }
                Event::Moved(mut transfer, outcome) => match transfer.absorb(outcome) {
                    Step::Finished(result) => transfer.finish(result),
                    Step::Again => {
                        // The room that its last piece left; behind the others when there is none.
                        if let Err(transfer) = ring.start(transfer) {
                            waiting.push_front(transfer);
                        }
                    }
                },
            }
        }
    }
}

impl Queue for UringQueue {
    fn submit(&self, operation: Operation) -> Result<(), (StorageError, Operation)> {
        if self.inbox.push(operation)? == Arrival::First {
            self.wake.signal();
        }
        Ok(())
    }

    fn counters(&self) -> IoCounters {
        self.inbox.counters()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn close(&self) {
        if self.inbox.guard().is_forked() {
            return;
        }
        self.inbox.close();
        self.wake.signal();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of the thread has answered every transfer already.
            let _ = thread.join();
        }
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        if self.inbox.guard().is_forked() {
            // The thread stayed behind in the parent: neither joining nor detaching means anything.
            let thread = self
                .thread
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::forget(thread.take());
        } else {
            self.close();
        }
    }
}

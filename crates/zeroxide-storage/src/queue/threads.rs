//! The thread engine: a few threads, each with one blocking `pread` or `pwrite` at a time.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use zeroxide_memory::Recorder;

use super::counters::IoCounters;
use super::inbox::{CloseOnExit, Inbox, Waited};
use super::operation::{OpKind, Operation};
use super::transfer::{Piece, Step, Transfer};
use super::{Queue, StorageError};

/// A queue served by a pool of threads.
pub(super) struct ThreadQueue {
    inbox: Arc<Inbox>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    description: String,
}

impl ThreadQueue {
    /// Starts `workers` threads; `why` goes into the description.
    pub(super) fn open(
        workers: usize,
        why: &str,
        recorder: Recorder,
    ) -> Result<Self, StorageError> {
        let inbox = Inbox::new(recorder);
        let queue = Self {
            inbox: Arc::clone(&inbox),
            threads: Mutex::new(Vec::with_capacity(workers)),
            description: format!("threads, {workers} workers ({why})"),
        };
        for index in 0..workers {
            let inbox = Arc::clone(&inbox);
            let thread = thread::Builder::new()
                .name(format!("zx-io-{index}"))
                .spawn(move || serve(&inbox))
                .map_err(|source| StorageError::Engine { source })?;
            queue
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(thread);
        }
        Ok(queue)
    }
}

/// The life of one thread.
fn serve(inbox: &Arc<Inbox>) {
    let _guard = CloseOnExit(Arc::clone(inbox));
    while let Waited::Transfer(transfer) = inbox.wait(None) {
        run(transfer);
    }
}

/// Moves one transfer from its beginning to its answer.
fn run(mut transfer: Transfer) {
    let result = loop {
        let outcome = move_piece(&mut transfer.piece());
        match transfer.absorb(outcome) {
            Step::Again => {}
            Step::Finished(result) => break result,
        }
    };
    transfer.finish(result);
}

/// One system call.
pub(super) fn move_piece(piece: &mut Piece<'_>) -> io::Result<usize> {
    let file = piece.file.file();
    match piece.kind {
        OpKind::Read => file.read_at(piece.buffer, piece.offset),
        OpKind::Write => file.write_at(piece.buffer, piece.offset),
    }
}

impl Queue for ThreadQueue {
    fn submit(&self, operation: Operation) -> Result<(), (StorageError, Operation)> {
        self.inbox.push(operation).map(|_| ())
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
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic of the thread has answered its transfer already.
            let _ = thread.join();
        }
    }
}

impl Drop for ThreadQueue {
    fn drop(&mut self) {
        if self.inbox.guard().is_forked() {
            // The threads stayed behind in the parent: neither joining nor detaching means anything.
            let threads = self
                .threads
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::forget(std::mem::take(threads));
        } else {
            self.close();
        }
    }
}

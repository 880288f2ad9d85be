//! An operation on its way: how much has moved, whether to go on, and the one answer it owes.

use std::io;
use std::sync::Arc;

use zeroxide_memory::{Activity, Begun};

use super::counters::Meter;
use super::operation::{Completion, OpKind, Operation};
use crate::error::StorageError;
use crate::file::{self, DiskFile};
use crate::syscall;

/// The most that Linux moves in one read or write call; longer transfers go in several pieces.
const MAX_PIECE: usize = 0x7fff_f000;

/// The smallest logical block of any disk. A direct transfer that stopped between two blocks goes on
/// from the last whole one, since it may not start anywhere else.
pub(super) const SECTOR: usize = 512;

/// How often in a row a transfer may be interrupted without progress before that is an error.
const MAX_STALLS: u32 = 1000;

/// What to do after an engine has reported on a piece.
pub(super) enum Step {
    /// Submit the next piece.
    Again,
    /// Answer the operation.
    Finished(Result<(), StorageError>),
}

/// An accepted operation. Owes its maker exactly one [`Completion`]: [`finish`](Self::finish) sends
/// it, and dropping a transfer that was not finished answers [`StorageError::Closed`].
pub(super) struct Transfer {
    /// Taken when answered.
    operation: Option<Operation>,
    meter: Arc<Meter>,
    accepted: Begun,
    done: usize,
    stalls: u32,
}

/// The part of a transfer that is still to be moved.
pub(super) struct Piece<'a> {
    pub(super) kind: OpKind,
    pub(super) file: &'a DiskFile,
    pub(super) offset: u64,
    pub(super) buffer: &'a mut [u8],
}

impl Transfer {
    pub(super) fn new(operation: Operation, meter: &Arc<Meter>) -> Self {
        meter.begin(operation.kind);
        let accepted = meter.recorder().begin();
        Self {
            operation: Some(operation),
            meter: Arc::clone(meter),
            accepted,
            done: 0,
            stalls: 0,
        }
    }

    fn operation(&self) -> &Operation {
        self.operation
            .as_ref()
            .expect("an unanswered transfer has its operation")
    }

    /// The next piece to move. Never empty.
    pub(super) fn piece(&mut self) -> Piece<'_> {
        let done = self.done;
        let operation = self
            .operation
            .as_mut()
            .expect("an unanswered transfer has its operation");
        let end = operation.buffer.len().min(done.saturating_add(MAX_PIECE));
        Piece {
            kind: operation.kind,
            file: &operation.file,
            offset: operation.offset + done as u64,
            buffer: &mut operation.buffer[done..end],
        }
    }

    /// Takes an engine's report on the last piece: how many bytes moved, or what went wrong.
    pub(super) fn absorb(&mut self, outcome: io::Result<usize>) -> Step {
        let expected = self.operation().buffer.len();
        match outcome {
            Ok(count) => {
                let reached = self.done.saturating_add(count).min(expected);
                if reached == expected {
                    self.done = expected;
                    return Step::Finished(Ok(()));
                }
                let resume = if self.operation().file.is_direct() {
                    reached - reached % SECTOR
                } else {
                    reached
                };
                if resume <= self.done {
                    return Step::Finished(Err(self.short(reached)));
                }
                self.done = resume;
                self.stalls = 0;
                Step::Again
            }
            Err(source) if is_transient(&source) && self.stalls < MAX_STALLS => {
                self.stalls += 1;
                Step::Again
            }
            Err(source) => Step::Finished(Err(self.failed(source))),
        }
    }

    /// Answers the operation.
    pub(super) fn finish(mut self, result: Result<(), StorageError>) {
        self.answer(result);
    }

    /// Gives up an operation whose buffer the kernel may still write to: the buffer is leaked, and the
    /// reply channel loses this sender without an answer.
    pub(super) fn abandon(mut self) {
        if let Some(operation) = self.operation.take() {
            self.meter.end(operation.kind, self.done, true);
            std::mem::forget(operation.buffer);
        }
    }

    fn answer(&mut self, result: Result<(), StorageError>) {
        let Some(operation) = self.operation.take() else {
            return;
        };
        self.meter.end(operation.kind, self.done, result.is_err());
        let Operation {
            kind,
            buffer,
            tag,
            unit,
            reply,
            ..
        } = operation;
        let activity = match kind {
            OpKind::Read => Activity::Read,
            OpKind::Write => Activity::Write,
        };
        // Before the answer: whoever has that finds the event recorded.
        let recorder = self.meter.recorder();
        recorder.end(self.accepted, activity, unit, self.done as u64);
        reply.send(Completion {
            tag,
            kind,
            buffer,
            result,
        });
    }

    fn short(&self, got: usize) -> StorageError {
        let operation = self.operation();
        StorageError::ShortTransfer {
            op: operation.kind,
            path: operation.file.path().to_path_buf(),
            offset: operation.offset,
            expected: operation.buffer.len(),
            got,
        }
    }

    fn failed(&self, source: io::Error) -> StorageError {
        let operation = self.operation();
        let path = operation.file.path().to_path_buf();
        let length = operation.buffer.len();
        if operation.kind == OpKind::Write && file::is_out_of_space(&source) {
            let need = (length - self.done) as u64;
            let free = syscall::free_bytes(&path).unwrap_or(0);
            return StorageError::NoSpace { path, need, free };
        }
        StorageError::Io {
            op: operation.kind,
            path,
            offset: operation.offset,
            length,
            done: self.done,
            source,
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.answer(Err(StorageError::Closed));
    }
}

/// Whether the same piece may simply be tried again.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

//! Tensors to and from files of the user's, through the same queue that moves training state.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_memory::{ForkGuard, Lease};
use zeroxide_storage::{
    Completion, DIRECT_ALIGN, DiskFile, EngineKind, OpKind, Operation, Queue, QueueOptions,
    StorageError, open_queue_with,
};

use crate::errors::to_python;
use crate::spec::TensorSpec;

/// Transfers between tensors and files that run while the caller goes on.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct FileQueue {
    queue: Arc<dyn Queue>,
    block: usize,
    work: Mutex<Work>,
    /// Whoever waits locks it, so that others can begin transfers meanwhile.
    answers: Mutex<Receiver<Completion>>,
    guard: ForkGuard,
}

/// What was asked for and has not been waited for.
struct Work {
    reply: Sender<Completion>,
    /// Pieces to come, of each transfer by its number.
    left: HashMap<u64, usize>,
    /// Transfers of nothing, which end at once.
    empty: usize,
    next: u64,
}

#[pymethods]
impl FileQueue {
    /// Raises `ValueError` for a block that is no multiple of 4096, `StorageError` for a depth or number of workers that
    /// is not in 1 to 4096, and where no engine can be started.
    #[new]
    fn new(
        py: Python<'_>,
        engine: &str,
        depth: usize,
        workers: usize,
        block: usize,
    ) -> PyResult<Self> {
        let kind = match engine {
            "auto" => EngineKind::Auto,
            "uring" => EngineKind::IoUring,
            "threads" => EngineKind::Threads,
            other => {
                return Err(PyValueError::new_err(format!(
                    "engine: expected auto, uring or threads, got {other}"
                )));
            }
        };
        if block == 0 || !block.is_multiple_of(DIRECT_ALIGN) {
            return Err(PyValueError::new_err(format!(
                "block: expected a multiple of {DIRECT_ALIGN} bytes, got {block}"
            )));
        }
        let options = QueueOptions {
            workers,
            ..QueueOptions::default()
        };
        let queue = py
            .detach(|| open_queue_with(kind, depth, &options))
            .map_err(|error| to_python(py, &error))?;
        let (reply, answers) = channel();
        let work = Mutex::new(Work {
            reply,
            left: HashMap::new(),
            empty: 0,
            next: 0,
        });
        Ok(Self {
            queue,
            block,
            work,
            answers: Mutex::new(answers),
            guard: ForkGuard::new(),
        })
    }

    /// Begins to fill the tensor of bytes from the file at `offset`. Nobody may touch the tensor until `wait` has
    /// returned. Raises `StorageError` where the file is shorter.
    fn read(&self, py: Python<'_>, bytes: &TensorSpec, path: PathBuf, offset: u64) -> PyResult<()> {
        self.begin(py, OpKind::Read, bytes, path, offset)
    }

    /// Begins to write the tensor of bytes into the file at `offset`; the file is made, or made longer, where it has to
    /// be. Nobody may change the tensor until `wait` has returned.
    fn write(
        &self,
        py: Python<'_>,
        bytes: &TensorSpec,
        path: PathBuf,
        offset: u64,
    ) -> PyResult<()> {
        self.begin(py, OpKind::Write, bytes, path, offset)
    }

    /// Waits for all transfers and returns how many there were. Raises `StorageError` for the first that failed, when
    /// all have ended.
    fn wait(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.finish())
            .map_err(|error| to_python(py, &error))
    }

    /// Transfers that have not been waited for; none in a forked child, which has none of its own.
    #[getter]
    fn pending(&self, py: Python<'_>) -> usize {
        py.detach(|| {
            if self.guard.is_forked() {
                return 0;
            }
            let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
            work.left.len() + work.empty
        })
    }

    /// The engine, and why it was chosen.
    fn describe(&self) -> String {
        self.queue.describe()
    }
}

impl FileQueue {
    fn begin(
        &self,
        py: Python<'_>,
        kind: OpKind,
        bytes: &TensorSpec,
        path: PathBuf,
        offset: u64,
    ) -> PyResult<()> {
        let length = bytes.bytes()?.len();
        let buffer = bytes.lease(py);
        let direct = length > 0
            && buffer.as_ptr().addr().is_multiple_of(DIRECT_ALIGN)
            && length.is_multiple_of(DIRECT_ALIGN)
            && offset.is_multiple_of(DIRECT_ALIGN as u64);
        py.detach(|| {
            self.check_process()?;
            let end = offset.saturating_add(length as u64);
            let file = match kind {
                OpKind::Read => DiskFile::open_to_read(path, direct)?,
                OpKind::Write => DiskFile::open_to_write(path, end, direct)?,
            };
            if end > file.bytes() {
                return Err(StorageError::OutOfRange {
                    op: kind,
                    path: file.path().to_path_buf(),
                    offset,
                    length,
                    bytes: file.bytes(),
                });
            }
            self.submit(kind, &file, offset, buffer)
        })
        .map_err(|error| to_python(py, &error))
    }

    fn check_process(&self) -> Result<(), StorageError> {
        self.guard
            .check_process()
            .map_err(|forked| StorageError::Forked {
                created: forked.created,
                current: forked.current,
            })
    }

    /// Hands the pieces of one transfer over.
    fn submit(
        &self,
        kind: OpKind,
        file: &Arc<DiskFile>,
        mut offset: u64,
        mut rest: Lease,
    ) -> Result<(), StorageError> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let tag = work.next;
        work.next += 1;
        if rest.is_empty() {
            work.empty += 1;
        }
        let mut pieces = 0;
        let mut outcome = Ok(());
        while !rest.is_empty() && outcome.is_ok() {
            let tail = rest.split_off(self.block.min(rest.len()));
            let buffer = std::mem::replace(&mut rest, tail);
            let length = buffer.len();
            let operation = Operation {
                kind,
                file: file.clone(),
                offset,
                buffer,
                tag,
                unit: None,
                reply: work.reply.clone().into(),
            };
            match self.queue.submit(operation) {
                Ok(()) => pieces += 1,
                Err((error, _)) => outcome = Err(error),
            }
            offset += length as u64;
        }
        if pieces > 0 {
            work.left.insert(tag, pieces);
        }
        outcome
    }

    fn finish(&self) -> Result<usize, StorageError> {
        self.check_process()?;
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = 0;
        let mut failed = None;
        loop {
            {
                let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
                ended += std::mem::take(&mut work.empty);
                if work.left.is_empty() {
                    break;
                }
            }
            // The queue answers every operation that it has taken, and there is a sender here.
            let Ok(answer) = answers.recv() else {
                return Err(StorageError::Closed);
            };
            let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
            let done = work.left.get_mut(&answer.tag).is_some_and(|left| {
                *left -= 1;
                *left == 0
            });
            if done {
                work.left.remove(&answer.tag);
                ended += 1;
            }
            if let Err(error) = answer.result {
                failed = failed.or(Some(error));
            }
        }
        failed.map_or(Ok(ended), Err)
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        // What was begun ends, so that no file has a part of what was to be written; `aio_handle` says what failed.
        let end = || {
            let _ = self.finish();
            self.queue.close();
        };
        if Python::try_attach(|py| py.detach(end)).is_none() {
            end();
        }
    }
}

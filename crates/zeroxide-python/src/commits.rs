//! Commits of a durable run for Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use zeroxide_offload::{CommittedReads, Offload, OffloadError};

use crate::errors::map;
use crate::offload::PyOffload;
use crate::spec::TensorSpec;
use crate::words::state_name;

/// Makes commits of one `Offload`, and goes back to the last one.
#[pyclass(frozen, module = "zeroxide._core", name = "Commits")]
pub(crate) struct PyCommits {
    inner: Arc<Offload>,
}

#[pymethods]
impl PyCommits {
    #[new]
    #[pyo3(signature = (core, /))]
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn new(core: PyRef<'_, PyOffload>) -> Self {
        Self {
            inner: Arc::clone(&core.inner),
        }
    }

    /// Numbers of the commits that an earlier run has left, the oldest first.
    fn found(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        map(py, py.detach(|| self.inner.found_commits()))
    }

    /// Goes on from one of them, or from none for 0; what was noted with it.
    fn adopt(&self, py: Python<'_>, generation: u64) -> PyResult<Option<String>> {
        let adopted = map(py, py.detach(|| self.inner.adopt(generation)))?;
        Ok(adopted.map(|commit| commit.note))
    }

    /// The first half of a commit of all state as it is now; its number. Nothing may change before `conclude`.
    fn prepare(&self, py: Python<'_>, note: &str) -> PyResult<u64> {
        map(py, py.detach(|| self.inner.prepare_commit(note)))
    }

    /// The second half, for when all ranks have done the first.
    fn conclude(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.conclude_commit()))
    }

    /// Makes all state but numbers of updates what the last commit says.
    fn roll_back(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.roll_back()))
    }

    /// A reader of the last commit. Until it is closed no other commit is made.
    fn reads(&self, py: Python<'_>) -> PyResult<PyCommittedReads> {
        let reads = map(py, py.detach(|| self.inner.committed_reads()))?;
        Ok(PyCommittedReads {
            inner: Mutex::new(Some(Arc::new(reads))),
        })
    }
}

/// Reads the last commit while training goes on.
#[pyclass(frozen, module = "zeroxide._core", name = "CommittedReads")]
pub(crate) struct PyCommittedReads {
    inner: Mutex<Option<Arc<CommittedReads>>>,
}

#[pymethods]
impl PyCommittedReads {
    /// Reads elements `start..` of one parameter's "weights" or a state tensor of its rule into an fp32 tensor.
    fn read_param(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        part: &str,
        start: u64,
        out: &TensorSpec,
    ) -> PyResult<()> {
        let (out, name) = (out.f32_mut()?, state_name(part));
        let done = py.detach(|| self.open()?.read_param(unit, param, name, start, out));
        map(py, done)
    }

    /// Reads bytes `start..` of one frozen parameter into a uint8 tensor, as they are.
    fn read_bytes(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        out: &TensorSpec,
    ) -> PyResult<()> {
        let out = out.bytes_mut()?;
        let done = py.detach(|| self.open()?.read_bytes(unit, param, start, out));
        map(py, done)
    }

    /// Ends it. Idempotent.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

impl PyCommittedReads {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<CommittedReads>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> zeroxide_offload::Result<Arc<CommittedReads>> {
        self.lock().clone().ok_or_else(|| OffloadError::Misuse {
            call: "read_param",
            what: "the reader is closed".into(),
        })
    }
}

//! Readers that wait for weights of other ranks, for the Python thread that can bring them.

use std::sync::Arc;

use pyo3::prelude::*;
use zeroxide_offload::Bringer;

/// Readers of weights that no call gathered and that lie in parts on several ranks, one after the other.
#[pyclass(frozen, module = "zeroxide._core", name = "Bringer")]
pub(crate) struct PyBringer {
    inner: Arc<Bringer>,
}

impl PyBringer {
    pub(crate) fn new(inner: Arc<Bringer>) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl PyBringer {
    /// Waits, without the GIL, until a reader wants something; false once nobody will any more.
    fn listen(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.listen())
    }

    /// Takes up the errand: the unit that is wanted, or `None` where the reader has given up.
    fn take(&self, py: Python<'_>) -> Option<usize> {
        py.detach(|| self.inner.take())
    }

    /// Ends an errand that was taken up: the unit can be read, or `problem` says why it cannot.
    #[pyo3(signature = (problem = None))]
    fn answer(&self, py: Python<'_>, problem: Option<String>) {
        py.detach(|| self.inner.answer(problem.map_or(Ok(()), Err)));
    }

    /// Ends `listen`.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

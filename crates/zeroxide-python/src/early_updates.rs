//! `EarlyUpdates` for Python: what backward updates before its step.

use pyo3::prelude::*;
use zeroxide_optim::Optimizer;

use crate::errors::map;
use crate::offload::PyOffload;
use crate::optimizer::Rule;

/// Updates of single units inside of backward, each as soon as the unit's gradients are complete; `Offload.step` updates
/// the others and ends the step.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct EarlyUpdates {
    offload: Py<PyOffload>,
}

#[pymethods]
impl EarlyUpdates {
    #[new]
    #[pyo3(signature = (offload, /))]
    fn new(offload: Py<PyOffload>) -> Self {
        Self { offload }
    }

    /// Backward begins: units may be updated with these hyperparameters, which the step must be given again.
    /// What is updated may be taken back until the step where it `speculates`.
    #[pyo3(signature = (groups, grad_scale, *, speculates = false))]
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn begin(
        &self,
        py: Python<'_>,
        groups: Vec<PyRef<'_, Rule>>,
        grad_scale: f64,
        speculates: bool,
    ) -> PyResult<()> {
        let groups: Vec<Optimizer> = groups.iter().map(|rule| rule.optimizer()).collect();
        let core = &self.offload.get().inner;
        let begun = py.detach(|| {
            if speculates {
                core.begin_speculation(&groups, grad_scale)
            } else {
                core.begin_early(&groups, grad_scale)
            }
        });
        map(py, begun)
    }

    /// Begins the update of a unit whose gradients are complete. Raises `ModelError` where one is not finite, and
    /// `StorageError`.
    fn update(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        let core = &self.offload.get().inner;
        map(py, py.detach(|| core.update_early(unit)))
    }

    /// Makes weights and state what they were before backward updated them; gradients stay. True where it had updated
    /// anything. Raises `StorageError`.
    fn take_back(&self, py: Python<'_>) -> PyResult<bool> {
        map(py, py.detach(|| self.offload.get().inner.take_back()))
    }

    /// Backward failed with `cause`. True where it had begun to update and that is not taken back: the state is mixed, and every later call says so.
    fn fail(&self, py: Python<'_>, cause: &str) -> PyResult<bool> {
        let core = &self.offload.get().inner;
        map(py, py.detach(|| core.fail_early(cause)))
    }
}

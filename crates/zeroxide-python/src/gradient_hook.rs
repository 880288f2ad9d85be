//! What autograd calls for every parameter in every backward, without a line of Python in the usual case.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PySet;

use crate::offload::PyOffload;
use crate::spec::TensorSpec;

/// Takes the gradient that torch has accumulated in one parameter's `grad` and adds it to the core's.
///
/// The Python objects that it refers to are the reducer's own, which says what each is for; what is unusual about a
/// gradient it hands on.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct GradientHook {
    offload: Py<PyOffload>,
    unit: Py<PyAny>,
    index: usize,
    position: usize,
    /// Positions of the unit whose gradients are outstanding.
    missing: Py<PySet>,
    /// What `unit.gradients` is while gradients may come.
    open: Py<PyAny>,
    reducer: Py<PyAny>,
    /// Nanoseconds in all calls so far.
    taken: AtomicU64,
    /// Those of them that the core worked.
    in_core: AtomicU64,
}

#[pymethods]
impl GradientHook {
    /// Raises `AttributeError` for a unit without an index.
    #[new]
    #[pyo3(signature = (offload, unit, position, missing, open, reducer, /))]
    fn new(
        offload: Py<PyOffload>,
        unit: Bound<'_, PyAny>,
        position: usize,
        missing: Py<PySet>,
        open: Py<PyAny>,
        reducer: Py<PyAny>,
    ) -> PyResult<Self> {
        Ok(Self {
            offload,
            index: unit.getattr("index")?.extract()?,
            unit: unit.unbind(),
            position,
            missing,
            open,
            reducer,
            taken: AtomicU64::new(0),
            in_core: AtomicU64::new(0),
        })
    }

    /// Called with the parameter. Raises what the core raises, and what the reducer does.
    fn __call__(&self, param: &Bound<'_, PyAny>) -> PyResult<()> {
        let begun = Instant::now();
        let done = self.take(param);
        count(&self.taken, begun);
        done
    }

    /// Seconds that calls have taken so far, with what the reducer does in them.
    #[getter]
    fn seconds(&self) -> f64 {
        seconds(&self.taken)
    }

    /// Seconds of those in which the core took a gradient.
    #[getter]
    fn core_seconds(&self) -> f64 {
        seconds(&self.in_core)
    }

    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.unit)?;
        visit.call(&self.missing)?;
        visit.call(&self.reducer)
    }
}

impl GradientHook {
    fn take(&self, param: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = param.py();
        let name = intern!(py, "grad");
        let grad = param.getattr(name)?;
        if grad.is_none() {
            return Ok(());
        }
        let (unit, reducer) = (self.unit.bind(py), self.reducer.bind(py));
        if !unit.getattr(intern!(py, "gradients"))?.is(&self.open) {
            reducer.call_method1(intern!(py, "check_open"), (unit,))?;
        }
        let divisor: u64 = reducer.getattr(intern!(py, "divisor"))?.extract()?;
        let spec = match divisor {
            1 => TensorSpec::of(&grad)?,
            _ => None,
        };
        param.setattr(name, py.None())?;
        if let Some(spec) = spec {
            let core = self.offload.get();
            let begun = Instant::now();
            let done = core.accumulate(py, self.index, self.position, 0, &spec, true);
            count(&self.in_core, begun);
            done?;
        } else {
            let unusual = intern!(py, "accumulate_unusual");
            reducer.call_method1(unusual, (unit, self.position, grad))?;
        }
        let missing = self.missing.bind(py);
        if missing.discard(self.position)? && missing.is_empty() {
            reducer.call_method1(intern!(py, "complete"), (unit,))?;
        }
        Ok(())
    }
}

/// Adds the time since `begun`.
fn count(total: &AtomicU64, begun: Instant) {
    let taken = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
    total.fetch_add(taken, Ordering::Relaxed);
}

#[expect(clippy::cast_precision_loss, reason = "a time to be shown")]
fn seconds(total: &AtomicU64) -> f64 {
    total.load(Ordering::Relaxed) as f64 * 1e-9
}

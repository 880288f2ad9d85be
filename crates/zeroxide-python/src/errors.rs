//! Rust errors as the exceptions of `zeroxide.errors`.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use zeroxide_memory::MemoryError;
use zeroxide_offload::{ExchangeError, OffloadError};

/// The exception a user sees: named by whose concern the error is, with the message unchanged.
pub(crate) fn to_python(py: Python<'_>, error: &OffloadError) -> PyErr {
    let name = match error {
        OffloadError::Storage(_) | OffloadError::Poisoned { .. } => "StorageError",
        OffloadError::Memory(MemoryError::OverBudget { .. })
        | OffloadError::Exchange(ExchangeError::Memory(MemoryError::OverBudget { .. }))
        | OffloadError::NoFrames { .. } => "BudgetError",
        OffloadError::Exchange(ExchangeError::Stopped { .. }) => "RanksError",
        OffloadError::Stray { .. } | OffloadError::Strayed { .. } => "ModelError",
        OffloadError::Memory(_)
        | OffloadError::Exchange(_)
        | OffloadError::Layout(_)
        | OffloadError::Optim(_)
        | OffloadError::Misuse { .. } => {
            return PyRuntimeError::new_err(error.to_string());
        }
    };
    let made = py
        .import("zeroxide.errors")
        .and_then(|module| module.getattr(name))
        .and_then(|class| class.call1((error.to_string(),)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// Maps the error half of a result.
pub(crate) fn map<T>(py: Python<'_>, result: Result<T, OffloadError>) -> PyResult<T> {
    result.map_err(|error| to_python(py, &error))
}

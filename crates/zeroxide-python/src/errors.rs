//! Rust errors as the exceptions of `zeroxide.errors`, with every field as an attribute.

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use zeroxide_offload::{Concern, Fact, Facts, Named, OffloadError};
use zeroxide_plan::PlanError;

/// The exception a user sees: named by whose concern the error is, with the message unchanged.
pub(crate) fn to_python<E: Facts + std::fmt::Display>(py: Python<'_>, error: &E) -> PyErr {
    raise(py, error.concern(), &error.to_string(), &error.facts())
}

/// An exception with a message of the caller's.
pub(crate) fn raise(py: Python<'_>, concern: Concern, message: &str, facts: &[Named]) -> PyErr {
    make(py, concern, message, facts).unwrap_or_else(|error| error)
}

fn make(py: Python<'_>, concern: Concern, message: &str, facts: &[Named]) -> PyResult<PyErr> {
    let class = match concern {
        Concern::Budget => "BudgetError",
        Concern::Storage => "StorageError",
        Concern::Ranks => "RanksError",
        Concern::Device => "DeviceError",
        Concern::Model => "ModelError",
        Concern::Value => "InvalidValueError",
        Concern::Core => "CoreError",
    };
    let class = py.import("zeroxide.errors")?.getattr(class)?;
    let exception = class.call1((message,))?;
    for (name, fact) in facts {
        match fact {
            Fact::Count(value) => exception.setattr(*name, value)?,
            Fact::Number(value) => exception.setattr(*name, value)?,
            Fact::Text(value) => exception.setattr(*name, value)?,
            Fact::Counts(values) => exception.setattr(*name, PyTuple::new(py, values)?)?,
        }
    }
    Ok(PyErr::from_value(exception))
}

/// Maps the error half of a result.
pub(crate) fn map<T>(py: Python<'_>, result: Result<T, OffloadError>) -> PyResult<T> {
    result.map_err(|error| to_python(py, &error))
}

/// A refusal of the planner, with its numbers.
pub(crate) fn plan_to_python(py: Python<'_>, error: &PlanError) -> PyErr {
    let line = error.to_string();
    let Some((need, limit, bucket)) = error.shortage() else {
        return raise(py, Concern::Core, &line, &[]);
    };
    let facts = [
        ("need", Fact::Count(need)),
        ("limit", Fact::Count(limit)),
        ("bucket", Fact::Text(bucket.to_owned())),
    ];
    raise(py, Concern::Budget, &line, &facts)
}

//! Hyperparameters of optimizer groups as Python gives them.

use pyo3::prelude::*;
use zeroxide_offload::Facts;
use zeroxide_optim::AdamParams;

use crate::errors::raise;

/// (lr, beta1, beta2, eps, `weight_decay`, decoupled, `bias_correction`)
pub(crate) type GroupTuple = (f64, f64, f64, f64, f64, bool, bool);

/// The groups as the kernels take them. Raises `ValueError` for the first value outside its range.
pub(crate) fn params(py: Python<'_>, groups: Vec<GroupTuple>) -> PyResult<Vec<AdamParams>> {
    let params: Vec<AdamParams> = groups
        .into_iter()
        .map(
            |(lr, beta1, beta2, eps, weight_decay, decoupled, bias_correction)| AdamParams {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                decoupled,
                bias_correction,
            },
        )
        .collect();
    for (number, group) in params.iter().enumerate() {
        group.validate().map_err(|error| {
            let message = format!("group {number}: {error}");
            raise(py, error.concern(), &message, &error.facts())
        })?;
    }
    Ok(params)
}

/// Raises `ValueError` for the first hyperparameter that a step would not take.
#[pyfunction]
pub(crate) fn check_groups(py: Python<'_>, groups: Vec<GroupTuple>) -> PyResult<()> {
    params(py, groups).map(|_| ())
}

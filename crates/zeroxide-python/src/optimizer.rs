//! Optimizer rules with their hyperparameters, one class a rule, and the state tensors that they have.

use pyo3::prelude::*;
use zeroxide_layout::StateLayout;
use zeroxide_optim::{AdagradParams, AdamParams, LionParams, Optimizer, SgdParams};

use crate::errors::to_python;
use crate::words::{parse_dtype, parse_format};

/// The base of all optimizer rules, which cannot be made.
#[pyclass(frozen, subclass, module = "zeroxide._core")]
pub(crate) struct Rule;

/// Defines the classes of rules: keyword arguments that become the fields of their hyperparameters, checked at once.
macro_rules! rules {
    ($($(#[$meta:meta])* $class:ident($params:ident) as $name:literal { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(
            $(#[$meta])*
            #[pyclass(frozen, eq, extends = Rule, module = "zeroxide._core", name = $name)]
            #[derive(PartialEq)]
            pub(crate) struct $class($params);

            #[pymethods]
            impl $class {
                #[new]
                #[pyo3(signature = (*, $($field),*))]
                #[allow(
                    clippy::too_many_arguments,
                    clippy::fn_params_excessive_bools,
                    reason = "keyword arguments of a Python constructor"
                )]
                fn new(py: Python<'_>, $($field: $ty),*) -> PyResult<PyClassInitializer<Self>> {
                    let params = $params { $($field),* };
                    match Optimizer::from(params).validate() {
                        Ok(()) => Ok(PyClassInitializer::from(Rule).add_subclass(Self(params))),
                        Err(error) => Err(to_python(py, &error)),
                    }
                }
            }
        )*

        /// A rule of any class.
        #[derive(FromPyObject)]
        pub(crate) enum AnyRule<'py> {
            $($class(PyRef<'py, $class>)),*
        }

        impl AnyRule<'_> {
            /// The rule as the core takes it.
            pub(crate) fn optimizer(&self) -> Optimizer {
                match self {
                    $(Self::$class(rule) => rule.0.into()),*
                }
            }
        }
    };
}

rules! {
    /// Adam and `AdamW`.
    Adam(AdamParams) as "Adam" {
        lr: f64, beta1: f64, beta2: f64, eps: f64, weight_decay: f64, decoupled: bool, bias_correction: bool,
    }
    /// Lion.
    Lion(LionParams) as "Lion" { lr: f64, beta1: f64, beta2: f64, weight_decay: f64 }
    /// Adagrad.
    Adagrad(AdagradParams) as "Adagrad" {
        lr: f64, lr_decay: f64, weight_decay: f64, initial_accumulator_value: f64, eps: f64,
    }
    /// SGD with momentum.
    Sgd(SgdParams) as "SGD" { lr: f64, momentum: f64, dampening: f64, weight_decay: f64, nesterov: bool }
}

/// (name, dtype, bytes of an element, initial value) of each state tensor that a rule has in a format for weights of
/// dtype `compute`, the live weight first. Raises `ValueError` for a format that does not go with the dtype.
#[pyfunction]
#[pyo3(signature = (optimizer, format, compute))]
#[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
pub(crate) fn state_tensors(
    py: Python<'_>,
    optimizer: AnyRule<'_>,
    format: &str,
    compute: &str,
) -> PyResult<Vec<(&'static str, &'static str, usize, f32)>> {
    let format = parse_format(format)?;
    let moments = optimizer.optimizer().moments();
    let layout = StateLayout::new(parse_dtype(compute)?, format, &moments)
        .map_err(|error| to_python(py, &error))?;
    let tensors = layout.tensors().iter();
    Ok(tensors
        .map(|tensor| {
            let (name, dtype) = (tensor.key.name(), tensor.dtype.name());
            (name, dtype, tensor.size(), tensor.initial)
        })
        .collect())
}

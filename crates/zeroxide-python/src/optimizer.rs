//! Optimizer rules with their hyperparameters, one class a rule, and the state tensors that they have.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};
use zeroxide_layout::{Format, STATE_BLOCK, StateLayout};
use zeroxide_optim::{Hyperparameter, Optimizer, Value};

use crate::errors::to_python;
use crate::words::{parse_dtype, parse_format};

/// The base of all optimizer rules, which cannot be made. A rule is made with all of its hyperparameters, by name.
#[pyclass(frozen, eq, subclass, module = "zeroxide._core")]
#[derive(PartialEq)]
pub(crate) struct Rule {
    optimizer: Optimizer,
    /// Name and value of each hyperparameter.
    values: Vec<(&'static str, Value)>,
}

#[pymethods]
impl Rule {
    #[new]
    #[classmethod]
    #[pyo3(signature = (*positional, **hyperparameters))]
    fn new(
        cls: &Bound<'_, PyType>,
        positional: &Bound<'_, PyTuple>,
        hyperparameters: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let py = cls.py();
        let name: Option<String> = cls.getattr("rule")?.extract()?;
        let mut every = Optimizer::every().into_iter();
        let Some(mut made) = every.find(|each| Some(each.name()) == name.as_deref()) else {
            let line = "cannot create 'zeroxide._core.Rule' instances";
            return Err(PyTypeError::new_err(line));
        };
        let title = made.title();
        let wrong = |what: &str| PyTypeError::new_err(format!("{title}.__new__() {what}"));
        if !positional.is_empty() {
            return Err(wrong("takes keyword arguments only"));
        }
        let given = hyperparameters.map_or_else(|| PyDict::new(py), Clone::clone);
        let known = made.hyperparameters();
        for key in given.keys() {
            if !known.iter().any(|each| key.eq(each.name).unwrap_or(false)) {
                return Err(wrong(&format!(
                    "got an unexpected keyword argument '{key}'"
                )));
            }
        }
        let (mut values, mut missing) = (Vec::new(), Vec::new());
        for each in known {
            match given.get_item(each.name)? {
                Some(value) => {
                    let value = value_of(&each, &value)?;
                    values.push((each.name, value));
                    let taken = made.set(each.name, value);
                    assert!(taken, "{title} has {} of its type", each.name);
                }
                None => missing.push(format!("'{}'", each.name)),
            }
        }
        if !missing.is_empty() {
            let names = missing.join(", ");
            return Err(wrong(&format!(
                "misses required keyword arguments: {names}"
            )));
        }
        made.validate().map_err(|error| to_python(py, &error))?;
        Ok(Self {
            optimizer: made,
            values,
        })
    }

    /// The hyperparameters that it was made with, by name.
    #[getter]
    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = PyDict::new(py);
        for (name, value) in &self.values {
            match value {
                Value::Number(number) => found.set_item(name, number)?,
                Value::Flag(flag) => found.set_item(name, flag)?,
            }
        }
        Ok(found)
    }

    /// What a parameter group calls the rule.
    #[classattr]
    fn rule() -> Option<&'static str> {
        None
    }
}

impl Rule {
    /// The rule as the core takes it.
    pub(crate) fn optimizer(&self) -> Optimizer {
        self.optimizer
    }
}

/// `given` as a value of the hyperparameter's type. Raises `TypeError` with its name.
fn value_of(to: &Hyperparameter, given: &Bound<'_, PyAny>) -> PyResult<Value> {
    let value = match to.default {
        Value::Number(_) => given.extract().map(Value::Number),
        Value::Flag(_) => given.extract().map(Value::Flag),
    };
    value.map_err(|error| {
        if !error.is_instance_of::<PyTypeError>(given.py()) {
            return error;
        }
        let reason = error.value(given.py()).to_string();
        PyTypeError::new_err(format!("argument '{}': {reason}", to.name))
    })
}

/// Adds the class of every rule: to the module under what people call the rule, and to its `RULES` under what a
/// parameter group calls it.
pub(crate) fn add_rules(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let rules = PyDict::new(py);
    for rule in Optimizer::every() {
        let class = class_of(py, &rule)?;
        module.setattr(rule.title(), &class)?;
        rules.set_item(rule.name(), class)?;
    }
    module.add("RULES", rules)
}

/// A subclass of [`Rule`] with the rule's name, and its hyperparameters with the defaults of its formula's source.
fn class_of<'py>(py: Python<'py>, rule: &Optimizer) -> PyResult<Bound<'py, PyAny>> {
    let inspect = py.import("inspect")?;
    let parameter = inspect.getattr("Parameter")?;
    let keyword = parameter.getattr("KEYWORD_ONLY")?;
    let (mut lines, mut parameters) = (vec![rule.about().to_owned(), String::new()], Vec::new());
    let defaults = PyDict::new(py);
    for each in rule.hyperparameters() {
        parameters.push(parameter.call1((each.name, &keyword))?);
        let default = match each.default {
            Value::Number(number) => number.into_pyobject(py)?.into_any(),
            Value::Flag(flag) => flag.into_pyobject(py)?.to_owned().into_any(),
        };
        let expected = match each.default {
            Value::Number(_) => each.expected,
            Value::Flag(_) => "true or false",
        };
        let (name, meaning) = (each.name, each.meaning);
        lines.push(format!(
            "{name}: {meaning} Expected: {expected}. Usual: {default}."
        ));
        defaults.set_item(each.name, default)?;
    }
    let body = PyDict::new(py);
    body.set_item("__module__", "zeroxide._core")?;
    body.set_item("__doc__", lines.join("\n"))?;
    body.set_item("__slots__", PyTuple::empty(py))?;
    body.set_item(
        "__signature__",
        inspect.getattr("Signature")?.call1((parameters,))?,
    )?;
    body.set_item("rule", rule.name())?;
    body.set_item("hyperparameters", defaults)?;
    py.get_type::<PyType>()
        .call1((rule.title(), (py.get_type::<Rule>(),), body))
}

/// Names of all formats that state can be stored in.
#[pyfunction]
pub(crate) fn formats() -> Vec<&'static str> {
    Format::ALL.iter().map(|format| format.name()).collect()
}

/// (name, dtype, bytes of 64 elements, initial value) of each state tensor that a rule has in a format for weights of
/// dtype `compute`, the live weight first. Raises `ValueError` for a format that does not go with the dtype, or with what
/// the rule starts from.
#[pyfunction]
#[pyo3(signature = (optimizer, format, compute))]
pub(crate) fn state_tensors(
    py: Python<'_>,
    optimizer: &Rule,
    format: &str,
    compute: &str,
) -> PyResult<Vec<(&'static str, &'static str, u64, f32)>> {
    let format = parse_format(format)?;
    let moments = optimizer.optimizer().moments();
    let layout = StateLayout::new(parse_dtype(compute)?, format, &moments)
        .map_err(|error| to_python(py, &error))?;
    let tensors = layout.tensors().iter();
    Ok(tensors
        .map(|tensor| {
            let (name, dtype) = (tensor.key.name(), tensor.dtype.name());
            let bytes = tensor.bytes(STATE_BLOCK as u64);
            (name, dtype, bytes, tensor.initial)
        })
        .collect())
}

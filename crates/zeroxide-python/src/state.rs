//! State of parameters that is kept elsewhere than in the core: a rule's own tensors as values, and one step of it.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::{STATE_BLOCK, StateLayout, StateTensor};
use zeroxide_optim::{Draw, decode_moment, encode_moment, update_drawn};

use crate::errors::to_python;
use crate::optimizer::Rule;
use crate::spec::TensorSpec;
use crate::words::{parse_dtype, parse_format};

fn layout_of(
    py: Python<'_>,
    optimizer: &Rule,
    format: &str,
    compute: &str,
) -> PyResult<StateLayout> {
    let moments = optimizer.optimizer().moments();
    StateLayout::new(parse_dtype(compute)?, parse_format(format)?, &moments)
        .map_err(|error| to_python(py, &error))
}

/// Raises `ValueError` unless the bytes are those of so many elements, and at a multiple of a word's.
fn check(tensor: &StateTensor, elements: usize, bytes: &[u8]) -> PyResult<()> {
    let expected = tensor.byte_range(&(0..elements as u64)).len();
    if bytes.len() == expected && bytes.as_ptr().addr().is_multiple_of(size_of::<f32>()) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{elements} elements of {} are {expected} bytes at a multiple of 4, got {} at {:p}",
        tensor.key,
        bytes.len(),
        bytes.as_ptr(),
    )))
}

/// The rule's own tensor of that name.
fn moment<'a>(layout: &'a StateLayout, name: &str) -> PyResult<&'a StateTensor> {
    let mut moments = layout.moments();
    moments
        .find(|tensor| tensor.key.name() == name)
        .ok_or_else(|| PyValueError::new_err(format!("the rule has no tensor {name}")))
}

/// Stores fp32 values of a rule's own tensor, from the start of a block on, rounded to the nearest; `bytes` is a uint8
/// tensor of its bytes.
#[pyfunction]
#[pyo3(name = "encode_moment", signature = (optimizer, format, compute, name, values, bytes))]
pub(crate) fn write_moment(
    py: Python<'_>,
    optimizer: &Rule,
    format: &str,
    compute: &str,
    name: &str,
    values: &TensorSpec,
    bytes: &TensorSpec,
) -> PyResult<()> {
    let layout = layout_of(py, optimizer, format, compute)?;
    let tensor = moment(&layout, name)?;
    let (values, bytes) = (values.f32()?, bytes.bytes_mut()?);
    if !values.is_empty() {
        check(tensor, values.len(), bytes)?;
        py.detach(|| encode_moment(tensor, values, bytes));
    }
    Ok(())
}

/// The values that those bytes stand for.
#[pyfunction]
#[pyo3(name = "decode_moment", signature = (optimizer, format, compute, name, bytes, out))]
pub(crate) fn read_moment(
    py: Python<'_>,
    optimizer: &Rule,
    format: &str,
    compute: &str,
    name: &str,
    bytes: &TensorSpec,
    out: &TensorSpec,
) -> PyResult<()> {
    let layout = layout_of(py, optimizer, format, compute)?;
    let tensor = moment(&layout, name)?;
    let (out, bytes) = (out.f32_mut()?, bytes.bytes()?);
    if !out.is_empty() {
        check(tensor, out.len(), bytes)?;
        py.detach(|| decode_moment(tensor, bytes, out));
    }
    Ok(())
}

/// Step number `number`, from 1 on, of a rule over state in host memory, in place. `tensors` are the bytes of its state
/// tensors in order, as uint8 tensors. Formats that round draw from `stream`, as from element `first` of the parameter on.
#[pyfunction]
#[pyo3(signature = (optimizer, number, grad_scale, format, compute, tensors, grad, stream = 0, first = 0))]
#[expect(
    clippy::needless_pass_by_value,
    clippy::too_many_arguments,
    reason = "how arguments are extracted, and all of a step"
)]
pub(crate) fn update_state(
    py: Python<'_>,
    optimizer: &Rule,
    number: u64,
    grad_scale: f64,
    format: &str,
    compute: &str,
    tensors: Vec<PyRef<'_, TensorSpec>>,
    grad: &TensorSpec,
    stream: u64,
    first: u64,
) -> PyResult<()> {
    let layout = layout_of(py, optimizer, format, compute)?;
    let grad = grad.grad()?;
    if number == 0 || !first.is_multiple_of(STATE_BLOCK as u64) {
        return Err(PyValueError::new_err(format!(
            "step {number} from element {first} on: steps are counted from 1, and blocks have {STATE_BLOCK} elements"
        )));
    }
    if tensors.len() != layout.tensors().len() {
        return Err(PyValueError::new_err(format!(
            "expected {} tensors, got {}",
            layout.tensors().len(),
            tensors.len()
        )));
    }
    if grad.is_empty() {
        return Ok(());
    }
    let mut state = Vec::with_capacity(tensors.len());
    for (tensor, given) in layout.tensors().iter().zip(&tensors) {
        let bytes = given.bytes_mut()?;
        check(tensor, grad.len(), bytes)?;
        state.push(bytes);
    }
    let step = optimizer.optimizer().prepare(number, grad_scale);
    let draw = Draw {
        stream,
        updates: number - 1,
        first,
    };
    py.detach(|| update_drawn(&step, &layout, state, grad, draw));
    Ok(())
}

//! Block-wise integers for Python, in memory that messages leave from and arrive in: int8 of weights, int4 of gradients.
//!
//! The GIL is released around each call. Lengths are checked here, so that the kernels' own checks never fail.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::Dtype;
use zeroxide_optim::{BLOCK, CodeBits, Feedback};

use crate::spec::TensorSpec;
use crate::words::parse_dtype;

fn code_bits(bits: u32) -> PyResult<CodeBits> {
    match bits {
        8 => Ok(CodeBits::Eight),
        4 => Ok(CodeBits::Four),
        other => Err(PyValueError::new_err(format!(
            "{other} bits: expected 8 or 4"
        ))),
    }
}

/// The elements in so many bytes. Raises `ValueError` unless they are whole blocks.
fn elements_of(bytes: &[u8], dtype: Dtype) -> PyResult<usize> {
    let aligned = bytes.as_ptr().addr().is_multiple_of(dtype.size());
    if !aligned || !bytes.len().is_multiple_of(BLOCK * dtype.size()) {
        return Err(PyValueError::new_err(format!(
            "{} bytes at {:p}: expected whole blocks of {BLOCK} aligned {} elements",
            bytes.len(),
            bytes.as_ptr(),
            dtype.name()
        )));
    }
    Ok(bytes.len() / dtype.size())
}

fn check(what: &str, expected: usize, got: usize) -> PyResult<()> {
    if expected == got {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{what}: expected {expected}, got {got}"
    )))
}

/// Bytes of a message of so many elements, whole blocks of 256, with codes of 8 or 4 bits.
#[pyfunction]
pub(crate) fn message_bytes(elements: usize, bits: u32) -> PyResult<usize> {
    if !elements.is_multiple_of(BLOCK) {
        return Err(PyValueError::new_err(format!(
            "{elements} elements: expected whole blocks of {BLOCK}"
        )));
    }
    Ok(code_bits(bits)?.message_bytes(elements))
}

/// Quantises elements, given as a uint8 tensor of their bytes, into a message.
#[pyfunction]
pub(crate) fn quantise_message(
    py: Python<'_>,
    values: &TensorSpec,
    dtype: &str,
    bits: u32,
    message: &TensorSpec,
) -> PyResult<()> {
    let (values, message) = (values.bytes()?, message.bytes_mut()?);
    let (dtype, bits) = (parse_dtype(dtype)?, code_bits(bits)?);
    let expected = bits.message_bytes(elements_of(values, dtype)?);
    check("bytes of a message", expected, message.len())?;
    py.detach(|| zeroxide_optim::quantise(values, dtype, bits, message));
    Ok(())
}

/// Brings a message back as elements, in a uint8 tensor of their bytes.
#[pyfunction]
pub(crate) fn dequantise_message(
    py: Python<'_>,
    message: &TensorSpec,
    bits: u32,
    values: &TensorSpec,
    dtype: &str,
) -> PyResult<()> {
    let (message, values) = (message.bytes()?, values.bytes_mut()?);
    let (dtype, bits) = (parse_dtype(dtype)?, code_bits(bits)?);
    let expected = bits.message_bytes(elements_of(values, dtype)?);
    check("bytes of a message", expected, message.len())?;
    py.detach(|| zeroxide_optim::dequantise(message, dtype, bits, values));
    Ok(())
}

/// Brings the message that ends a room back in place: afterwards the elements fill it.
#[pyfunction]
pub(crate) fn expand_message(
    py: Python<'_>,
    room: &TensorSpec,
    dtype: &str,
    bits: u32,
) -> PyResult<()> {
    let room = room.bytes_mut()?;
    let (dtype, bits) = (parse_dtype(dtype)?, code_bits(bits)?);
    elements_of(room, dtype)?;
    py.detach(|| zeroxide_optim::expand(room, dtype, bits));
    Ok(())
}

/// Quantises elements in place, to a message of 4 bits at the start of their room.
///
/// residual: bf16, what was kept of the same elements; `factor` is what the units of values have been multiplied with
/// since, and `beta` the weight of what was kept. `None` keeps nothing.
#[pyfunction]
#[pyo3(signature = (room, dtype, residual = None, factor = 1.0, beta = 0.0))]
pub(crate) fn shrink_gradients(
    py: Python<'_>,
    room: &TensorSpec,
    dtype: &str,
    residual: Option<&TensorSpec>,
    factor: f32,
    beta: f32,
) -> PyResult<()> {
    let (room, dtype) = (room.bytes_mut()?, parse_dtype(dtype)?);
    let elements = elements_of(room, dtype)?;
    let residual = residual.map(TensorSpec::bf16_mut).transpose()?;
    if let Some(residual) = &residual {
        check("elements kept", elements, residual.len())?;
    }
    let feedback = residual.map(|residual| Feedback {
        residual,
        factor,
        beta,
    });
    py.detach(|| zeroxide_optim::shrink(room, dtype, CodeBits::Four, feedback));
    Ok(())
}

/// Adds what a message of 4 bits stands for to fp32 sums.
#[pyfunction]
pub(crate) fn add_message(py: Python<'_>, sums: &TensorSpec, message: &TensorSpec) -> PyResult<()> {
    let (sums, message) = (sums.f32_mut()?, message.bytes()?);
    if !sums.len().is_multiple_of(BLOCK) {
        return Err(PyValueError::new_err(format!(
            "{} sums: expected whole blocks of {BLOCK}",
            sums.len()
        )));
    }
    check(
        "bytes of a message",
        CodeBits::Four.message_bytes(sums.len()),
        message.len(),
    )?;
    py.detach(|| zeroxide_optim::add_message(sums, message, CodeBits::Four));
    Ok(())
}

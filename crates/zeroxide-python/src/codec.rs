//! Whole values in and out of what is stored, for whoever stores it elsewhere than in the core.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::StateLayout;
use zeroxide_optim::{carry_exact, encode_exact, encode_live, join_live, widen};

use crate::errors::to_python;
use crate::spec::TensorSpec;
use crate::words::{parse_dtype, parse_format};

/// The layout of a weight, and whether there is a tensor beside it that makes it exact.
fn layout_of(py: Python<'_>, format: &str, compute: &str) -> PyResult<(StateLayout, bool)> {
    let layout = StateLayout::new(parse_dtype(compute)?, parse_format(format)?, &[])
        .map_err(|error| to_python(py, &error))?;
    let exact = layout.exact().is_some();
    Ok((layout, exact))
}

/// Raises `ValueError` unless `live` and `exact` hold the bytes of `elements` weights.
fn check_lengths(
    layout: &StateLayout,
    elements: usize,
    live: usize,
    exact: Option<usize>,
) -> PyResult<()> {
    let size = layout
        .exact()
        .map(|tensor| tensor.byte_range(&(0..elements as u64)).len());
    let expected = layout.compute().size() * elements;
    if live == expected && exact == size {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{elements} weights are {expected} bytes and {size:?} that make them exact, got {live} and {exact:?}"
    )))
}

/// Stores fp32 values as live weights and, where the format has such a tensor, what makes those exact. Both are given as
/// uint8 tensors of their bytes.
#[pyfunction]
#[pyo3(signature = (format, compute, values, live, exact = None))]
pub(crate) fn encode_weights(
    py: Python<'_>,
    format: &str,
    compute: &str,
    values: &TensorSpec,
    live: &TensorSpec,
    exact: Option<&TensorSpec>,
) -> PyResult<()> {
    let (layout, _) = layout_of(py, format, compute)?;
    let (values, live) = (values.f32()?, live.bytes_mut()?);
    let exact = exact.map(TensorSpec::bytes_mut).transpose()?;
    check_lengths(
        &layout,
        values.len(),
        live.len(),
        exact.as_ref().map(|bytes| bytes.len()),
    )?;
    if values.is_empty() {
        // Bytes that are none lie at no multiple of a word.
        return Ok(());
    }
    py.detach(|| {
        encode_live(&layout, values, live);
        if let Some(exact) = exact {
            encode_exact(&layout, values, exact);
        }
    });
    Ok(())
}

/// The values that live weights have with what makes them exact, as an update would take them: a live weight that is not
/// the rounding of the value beside it stands for itself.
#[pyfunction]
#[pyo3(signature = (format, compute, out, live, exact = None))]
pub(crate) fn decode_weights(
    py: Python<'_>,
    format: &str,
    compute: &str,
    out: &TensorSpec,
    live: &TensorSpec,
    exact: Option<&TensorSpec>,
) -> PyResult<()> {
    let (layout, has_exact) = layout_of(py, format, compute)?;
    let (out, live) = (out.f32_mut()?, live.bytes()?);
    let exact = exact.map(TensorSpec::bytes).transpose()?;
    check_lengths(&layout, out.len(), live.len(), exact.map(<[u8]>::len))?;
    if out.is_empty() {
        return Ok(());
    }
    py.detach(|| match exact {
        Some(exact) if has_exact => {
            carry_exact(&layout, exact, out);
            join_live(&layout, live, out);
        }
        _ => widen(layout.compute(), live, out),
    });
    Ok(())
}

/// Rounds fp32 values to bf16 as the exact formats do, half up.
#[pyfunction]
#[pyo3(signature = (values, out))]
pub(crate) fn round_bf16(py: Python<'_>, values: &TensorSpec, out: &TensorSpec) -> PyResult<()> {
    let (values, out) = (values.f32()?, out.bf16_mut()?);
    if values.len() != out.len() {
        return Err(PyValueError::new_err(format!(
            "{} values into {} places",
            values.len(),
            out.len()
        )));
    }
    py.detach(|| {
        out.iter_mut()
            .zip(values)
            .for_each(|(out, value)| *out = zeroxide_optim::bf16_half_up(*value));
    });
    Ok(())
}

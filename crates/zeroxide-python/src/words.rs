//! Words in which Python names dtypes, formats and parts of a parameter, as the core's types.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::{Dtype, Format, LayoutError, StateKey};
use zeroxide_offload::Transport;

use crate::errors::to_python;

/// Of what an update takes of a unit on a device: first element, elements, group, updates made before, random bits.
pub(crate) type RunRow = (u64, u64, usize, u64, u64);

pub(crate) fn parse_dtype(name: &str) -> PyResult<Dtype> {
    Dtype::parse(name).map_err(|error| wrong(&error))
}

/// A word that the layout does not know, with it as a field.
fn wrong(error: &LayoutError) -> PyErr {
    Python::attach(|py| to_python(py, error))
}

/// The part of a parameter that is read and written, but never filled.
pub(crate) const GRADIENT: &str = "grad";

/// A weight with all its bits, of which the live weight is only a part.
const WEIGHTS: &str = "weights";

/// The state tensor that the core fills, reads and writes for a part of a parameter.
pub(crate) fn state_name(part: &str) -> &str {
    if part == WEIGHTS {
        StateKey::WEIGHT.name()
    } else {
        part
    }
}

/// A word that is none of those known.
pub(crate) fn unknown(what: &str, got: &str, expected: &[&str]) -> PyErr {
    let (last, others) = expected.split_last().expect("some word is known");
    PyValueError::new_err(format!(
        "unknown {what} {got:?}: expected {} or {last}",
        others.join(", ")
    ))
}

pub(crate) fn parse_transport(name: &str) -> PyResult<Transport> {
    match name {
        "shared" => Ok(Transport::Shared),
        "collective" => Ok(Transport::Collective),
        other => Err(unknown("transport", other, &["shared", "collective"])),
    }
}

pub(crate) fn parse_format(name: &str) -> PyResult<Format> {
    Format::parse(name).map_err(|error| wrong(&error))
}

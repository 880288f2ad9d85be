//! Words and tuples in which Python gives settings, as the core's types.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::{Dtype, Format, ParamShape, StateKey};
use zeroxide_offload::{StateHome, Transport, UnitSpec, WeightHome};
use zeroxide_storage::EngineKind;

use crate::optimizer::AnyRule;

/// (name, [(elements, trainable)], home of the weights, home of the optimizer state, gradients come all through
/// backward, optimizer rule, format of the optimizer state)
pub(crate) type UnitTuple<'py> = (
    String,
    Vec<(u64, bool)>,
    String,
    String,
    bool,
    AnyRule<'py>,
    String,
);

pub(crate) fn unit_spec(
    (name, params, weights, state, held_through_backward, optimizer, format): UnitTuple<'_>,
) -> PyResult<UnitSpec> {
    Ok(UnitSpec {
        name,
        held_through_backward,
        params: params
            .into_iter()
            .map(|(numel, trainable)| ParamShape { numel, trainable })
            .collect(),
        weights: match weights.as_str() {
            "host" => WeightHome::Host,
            "disk" => WeightHome::Disk,
            "shard" => WeightHome::Shard,
            "borrowed" => WeightHome::Borrowed,
            other => {
                return Err(unknown(
                    "home of weights",
                    other,
                    "host, disk, shard or borrowed",
                ));
            }
        },
        state: match state.as_str() {
            "host" => StateHome::Host,
            "disk" => StateHome::Disk,
            other => {
                return Err(unknown(
                    "home of the optimizer state",
                    other,
                    "host or disk",
                ));
            }
        },
        optimizer: optimizer.optimizer(),
        format: parse_format(&format)?,
    })
}

pub(crate) fn parse_dtype(name: &str) -> PyResult<Dtype> {
    Dtype::parse(name).map_err(|error| PyValueError::new_err(error.to_string()))
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

fn unknown(what: &str, got: &str, expected: &str) -> PyErr {
    PyValueError::new_err(format!("unknown {what} {got:?}: expected {expected}"))
}

pub(crate) fn parse_transport(name: &str) -> PyResult<Transport> {
    match name {
        "shared" => Ok(Transport::Shared),
        "collective" => Ok(Transport::Collective),
        other => Err(unknown("transport", other, "shared or collective")),
    }
}

pub(crate) fn parse_format(name: &str) -> PyResult<Format> {
    Format::parse(name).map_err(|error| PyValueError::new_err(error.to_string()))
}

pub(crate) fn parse_engine(name: &str) -> PyResult<EngineKind> {
    match name {
        "auto" => Ok(EngineKind::Auto),
        "io_uring" => Ok(EngineKind::IoUring),
        "threads" => Ok(EngineKind::Threads),
        other => Err(unknown("engine", other, "auto, io_uring or threads")),
    }
}

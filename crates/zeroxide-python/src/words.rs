//! Words and tuples in which Python gives settings, as the core's types.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_offload::{StateHome, StateKey, Transport, UnitSpec, WeightHome};
use zeroxide_storage::EngineKind;

/// (name, [(elements, trainable)], home of the weights, home of the optimizer state, gradients come all through
/// backward)
pub(crate) type UnitTuple = (String, Vec<(u64, bool)>, String, String, bool);

pub(crate) fn unit_spec(
    (name, params, weights, state, held_through_backward): UnitTuple,
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
    })
}

pub(crate) fn parse_dtype(name: &str) -> PyResult<Dtype> {
    Dtype::parse(name).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// The part of a parameter that is read and written, but never filled.
pub(crate) const GRADIENT: &str = "grad";

pub(crate) fn parse_part(name: &str) -> PyResult<StateKey> {
    match name {
        "weights" => Ok(StateKey::Weights),
        "exp_avg" => Ok(StateKey::ExpAvg),
        "exp_avg_sq" => Ok(StateKey::ExpAvgSq),
        other => Err(unknown(
            "part",
            other,
            "weights, exp_avg, exp_avg_sq or, where it is not filled, grad",
        )),
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
    match name {
        "fp32" => Ok(Format::Fp32),
        "split" => Ok(Format::Split),
        other => Err(unknown("format", other, "fp32 or split")),
    }
}

pub(crate) fn parse_engine(name: &str) -> PyResult<EngineKind> {
    match name {
        "auto" => Ok(EngineKind::Auto),
        "io_uring" => Ok(EngineKind::IoUring),
        "threads" => Ok(EngineKind::Threads),
        other => Err(unknown("engine", other, "auto, io_uring or threads")),
    }
}

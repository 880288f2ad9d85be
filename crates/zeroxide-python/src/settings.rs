//! What the caller decides before the first byte is placed, one class for each noun of the core's settings.

use std::path::PathBuf;

use pyo3::prelude::*;
use zeroxide_layout::ParamShape;
use zeroxide_offload::{
    GradientHome, Mesh, MeshPosition, Quantisation, Settings, StateHome, Transport, UnitSpec,
    WeightHome,
};
use zeroxide_storage::EngineKind;

use crate::optimizer::Rule;
use crate::words::{parse_dtype, parse_format, unknown};

/// Defines enums that can also be made from their word, as configs and plans have it.
macro_rules! enums {
    ($($(#[$meta:meta])* $class:ident as $name:literal: $core:ty, $what:literal { $($variant:ident = $word:literal),* })*) => {
        $(
            $(#[$meta])*
            #[pyclass(frozen, eq, hash, skip_from_py_object, module = "zeroxide._core", name = $name,
                      rename_all = "SCREAMING_SNAKE_CASE")]
            #[derive(Clone, Copy, PartialEq, Eq, Hash)]
            pub(crate) enum $class { $($variant),* }

            #[pymethods]
            impl $class {
                #[new]
                #[pyo3(signature = (word, /))]
                fn new(word: &str) -> PyResult<Self> {
                    match word {
                        $($word => Ok(Self::$variant),)*
                        other => Err(unknown($what, other, &[$($word),*])),
                    }
                }
            }

            impl From<$class> for $core {
                fn from(value: $class) -> Self {
                    match value {
                        $($class::$variant => Self::$variant),*
                    }
                }
            }
        )*
    };
}

enums! {
    /// Where the live weights of a unit are at home.
    PyWeightHome as "WeightHome": WeightHome, "home of weights" {
        Host = "host", Disk = "disk", Shard = "shard", Borrowed = "borrowed"
    }
    /// Where the optimizer state of a unit is at home.
    PyStateHome as "StateHome": StateHome, "home of the optimizer state" {
        Host = "host", Disk = "disk", Device = "device"
    }
    /// Where the gradients of a unit wait for the step: "disk" if its optimizer state is there, "consumed" if they do not.
    PyGradientHome as "GradientHome": GradientHome, "home of gradients" {
        Host = "host", Disk = "disk", Consumed = "consumed"
    }
    /// How gradients reach the ranks that keep them.
    PyTransport as "Transport": Transport, "transport" { Shared = "shared", Collective = "collective" }
    /// What moves bytes between memory and disk.
    PyIoEngine as "IoEngine": EngineKind, "engine" { Auto = "auto", IoUring = "io_uring", Threads = "threads" }
}

/// One unit: its parameters as (elements, trainable), the homes of weights and state, and how it is updated. A format that
/// rounds needs `streams`, the random bits of each parameter. `mesh` is None for a unit that all ranks train.
#[pyclass(frozen, module = "zeroxide._core", name = "UnitSpec")]
pub(crate) struct PyUnitSpec {
    pub(crate) inner: UnitSpec,
}

#[pymethods]
impl PyUnitSpec {
    #[new]
    #[pyo3(signature = (*, name, params, weights, state, optimizer, format, held_through_backward = false,
                        gradients = None, streams = Vec::new(), mesh = None))]
    #[expect(
        clippy::too_many_arguments,
        clippy::needless_pass_by_value,
        reason = "keyword arguments of a Python constructor"
    )]
    fn new(
        name: String,
        params: Vec<(u64, bool)>,
        weights: PyRef<'_, PyWeightHome>,
        state: PyRef<'_, PyStateHome>,
        optimizer: PyRef<'_, Rule>,
        format: &str,
        held_through_backward: bool,
        gradients: Option<PyRef<'_, PyGradientHome>>,
        streams: Vec<u64>,
        mesh: Option<PyRef<'_, PyMeshPosition>>,
    ) -> PyResult<Self> {
        let params = params
            .into_iter()
            .map(|(numel, trainable)| ParamShape { numel, trainable })
            .collect();
        Ok(Self {
            inner: UnitSpec {
                name,
                held_through_backward,
                params,
                weights: (*weights).into(),
                state: (*state).into(),
                gradients: gradients.map_or(GradientHome::Host, |home| (*home).into()),
                optimizer: optimizer.optimizer(),
                format: parse_format(format)?,
                streams,
                mesh: mesh.map(|mesh| mesh.inner.groups),
            },
        })
    }
}

/// This process's position in the groups that a unit has: `shards` ranks in a row, and `replicas` such groups.
#[pyclass(frozen, module = "zeroxide._core", name = "MeshPosition")]
pub(crate) struct PyMeshPosition {
    inner: MeshPosition,
}

#[pymethods]
impl PyMeshPosition {
    #[new]
    #[pyo3(signature = (*, rank, shards, replicas, transport))]
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn new(rank: u32, shards: u32, replicas: u32, transport: PyRef<'_, PyTransport>) -> Self {
        Self {
            inner: MeshPosition {
                groups: Mesh {
                    rank,
                    shards,
                    replicas,
                },
                transport: (*transport).into(),
            },
        }
    }
}

/// What travels between ranks as integers: `near` ranks in a row are a group, 0 for all; `weights` says it of each unit.
#[pyclass(
    frozen,
    skip_from_py_object,
    module = "zeroxide._core",
    name = "Quantisation"
)]
#[derive(Clone)]
pub(crate) struct PyQuantisation {
    pub(crate) inner: Quantisation,
}

#[pymethods]
impl PyQuantisation {
    #[new]
    #[pyo3(signature = (*, near = 0, weights = Vec::new(), gradients = false, feedback = false))]
    fn new(near: u32, weights: Vec<bool>, gradients: bool, feedback: bool) -> Self {
        Self {
            inner: Quantisation {
                near,
                weights,
                gradients,
                feedback,
            },
        }
    }
}

/// Everything else that a core needs to know. `*_bytes` and `limit` are bytes; `shares` are the parts that `directories` have
/// of all bytes, one above 0 for each, or none for equal ones;
/// what is on disk has a second place where it `speculates`; `mesh` is None for one rank; `durable` is
/// (name, value) of what a run must have in common with the one that it continues, None for a run that leaves nothing.
#[pyclass(frozen, module = "zeroxide._core", name = "Settings")]
pub(crate) struct PySettings {
    pub(crate) inner: Settings,
}

#[pymethods]
impl PySettings {
    #[new]
    #[pyo3(signature = (*, limit, threads, compute, grad, tile_elements, staging_bytes, gathered_bytes, engine,
                        queue_depth, directories, job, shares = Vec::new(), mesh = None, comm_dtype = None, quantisation = None, reduce_scale = 1.0,
                        defers_steps = false, speculates = false, durable = None))]
    #[expect(
        clippy::too_many_arguments,
        clippy::needless_pass_by_value,
        reason = "keyword arguments of a Python constructor"
    )]
    fn new(
        limit: Option<u64>,
        threads: usize,
        compute: &str,
        grad: &str,
        tile_elements: u64,
        staging_bytes: u64,
        gathered_bytes: u64,
        engine: PyRef<'_, PyIoEngine>,
        queue_depth: usize,
        directories: Vec<PathBuf>,
        job: String,
        shares: Vec<u64>,
        mesh: Option<PyRef<'_, PyMeshPosition>>,
        comm_dtype: Option<&str>,
        quantisation: Option<PyRef<'_, PyQuantisation>>,
        reduce_scale: f32,
        defers_steps: bool,
        speculates: bool,
        durable: Option<Vec<(String, String)>>,
    ) -> PyResult<Self> {
        Ok(Self {
            inner: Settings {
                mesh: mesh.map_or(MeshPosition::ALONE, |mesh| mesh.inner),
                comm_dtype: parse_dtype(comm_dtype.unwrap_or(compute))?,
                quantisation: quantisation
                    .map(|quantisation| quantisation.inner.clone())
                    .unwrap_or_default(),
                reduce_scale,
                defers_steps,
                speculates,
                limit,
                threads,
                compute: parse_dtype(compute)?,
                grad: parse_dtype(grad)?,
                tile_elements,
                staging_bytes,
                gathered_bytes,
                engine: (*engine).into(),
                queue_depth,
                directories,
                shares,
                job,
                durable,
            },
        })
    }
}

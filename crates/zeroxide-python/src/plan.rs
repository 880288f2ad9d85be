//! `Plan` for Python: homes, bytes and the schedule, as the core counts them.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use zeroxide_layout::{Dtype, ParamShape, StateLayout};
use zeroxide_plan::{
    Buckets, Collective, DeviceRequest, DeviceShare, Dtypes, Mesh, Pass, Passed, Plan, PlanRequest,
    Schedule, StateBytes, UnitRequest,
};

use crate::errors::plan_to_python;
use crate::optimizer::Rule;
use crate::settings::{PyGradientHome, PyQuantisation};
use crate::words::{parse_dtype, parse_format, parse_transport};

/// (name, [(elements, trainable)], held through backward, optimizer rule, format of the optimizer state, turn)
type UnitTuple<'py> = (
    String,
    Vec<(u64, bool)>,
    bool,
    PyRef<'py, Rule>,
    String,
    u32,
);

fn unit_request(compute: Dtype, unit: UnitTuple<'_>) -> PyResult<UnitRequest> {
    let (name, params, held_through_backward, optimizer, format, turn) = unit;
    let moments = optimizer.optimizer().moments();
    let layout = StateLayout::new(compute, parse_format(&format)?, &moments)
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    Ok(UnitRequest {
        name,
        params: params
            .into_iter()
            .map(|(numel, trainable)| ParamShape { numel, trainable })
            .collect(),
        held_through_backward,
        state_bytes: StateBytes::of(&layout),
        turn,
        mesh: None,
    })
}

/// What is asked of a device that computes: whether all `weights_stay` there, the `limit` of bytes on it, and the `share`
/// (0 to 1) of the optimizer state that is at home there, or the `room` in bytes that it fills beside the weights.
#[pyclass(frozen, module = "zeroxide._core", name = "DeviceRequest")]
pub(crate) struct PyDeviceRequest {
    inner: DeviceRequest,
}

#[pymethods]
impl PyDeviceRequest {
    /// Raises `ValueError` unless one of `share` and `room` is given, and for a share outside of 0 to 1.
    #[new]
    #[pyo3(signature = (*, weights_stay, limit = None, share = None, room = None))]
    fn new(
        weights_stay: bool,
        limit: Option<u64>,
        share: Option<f64>,
        room: Option<u64>,
    ) -> PyResult<Self> {
        let state = match (share, room) {
            (Some(share), None) if (0.0..=1.0).contains(&share) => DeviceShare::Elements(share),
            (None, Some(room)) => DeviceShare::Room(room),
            _ => {
                return Err(PyValueError::new_err(
                    "expected a share from 0 to 1, or a room in bytes",
                ));
            }
        };
        Ok(Self {
            inner: DeviceRequest {
                weights_stay,
                limit,
                state,
            },
        })
    }
}

/// Where every byte of a training state lies, and what a step exchanges.
#[pyclass(frozen, module = "zeroxide._core", name = "Plan")]
pub(crate) struct PyPlan {
    inner: Plan,
}

#[pymethods]
impl PyPlan {
    #[new]
    #[pyo3(signature = (*, units, rank, shards, replicas, stage, transport, compute, grad, comm, weights_on_disk,
                        state_on_disk, prefetch, gradients = None, pinned = 0, quantisation = None, tile_bytes = None, staging_bytes = None,
                        limit = None, resident = 0, device = None, apart = Vec::new()))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keyword arguments of a Python constructor"
    )]
    fn new(
        py: Python<'_>,
        units: Vec<UnitTuple<'_>>,
        rank: u32,
        shards: u32,
        replicas: u32,
        stage: u8,
        transport: &str,
        compute: &str,
        grad: &str,
        comm: &str,
        weights_on_disk: bool,
        state_on_disk: bool,
        prefetch: usize,
        gradients: Option<PyRef<'_, PyGradientHome>>,
        pinned: u64,
        quantisation: Option<PyRef<'_, PyQuantisation>>,
        tile_bytes: Option<u64>,
        staging_bytes: Option<u64>,
        limit: Option<u64>,
        resident: u64,
        device: Option<PyRef<'_, PyDeviceRequest>>,
        apart: Vec<(usize, u32, u32, u32)>,
    ) -> PyResult<Self> {
        let mesh = Mesh {
            rank,
            shards,
            replicas,
        };
        let compute = parse_dtype(compute)?;
        let mut units = units
            .into_iter()
            .map(|unit| unit_request(compute, unit))
            .collect::<PyResult<Vec<_>>>()?;
        for (unit, rank, shards, replicas) in apart {
            let Some(unit) = units.get_mut(unit) else {
                return Err(PyValueError::new_err(format!(
                    "apart: there is no unit {unit}"
                )));
            };
            unit.mesh = Some(Mesh {
                rank,
                shards,
                replicas,
            });
        }
        let request = PlanRequest {
            mesh,
            stage,
            transport: parse_transport(transport)?,
            dtypes: Dtypes {
                compute,
                grad: parse_dtype(grad)?,
                comm: parse_dtype(comm)?,
            },
            quantisation: quantisation
                .map(|quantisation| quantisation.inner.clone())
                .unwrap_or_default(),
            weights_on_disk,
            state_on_disk,
            gradients: gradients.map(|home| (*home).into()),
            pinned,
            units,
            prefetch,
            tile_bytes,
            staging_bytes,
            limit,
            resident,
            device: device.map(|device| device.inner),
        };
        Ok(Self {
            inner: Plan::new(request).map_err(|error| plan_to_python(py, &error))?,
        })
    }

    /// Home of all weights: "host", "shard" or "disk".
    #[getter]
    fn weights(&self) -> &'static str {
        self.inner.weights.name()
    }

    /// Home of all optimizer state, but of units that are at home on the device: "host" or "disk".
    #[getter]
    fn state(&self) -> &'static str {
        self.inner.state.name()
    }

    /// Home of all gradients of units whose optimizer state is on disk, and of all others "host": "host" or "disk". Or
    /// "consumed", of all units: backward updates each as soon as its gradients are complete.
    #[getter]
    fn gradients(&self) -> &'static str {
        self.inner.gradients.name()
    }

    /// Home of each unit's optimizer state: "host", "disk" or "device".
    #[getter]
    fn states(&self) -> Vec<&'static str> {
        let units = self.inner.placement.units.iter();
        units.map(|unit| unit.shape.state.name()).collect()
    }

    /// Bytes on the device that computes, by bucket; `None` where that is the host.
    #[getter]
    fn device_buckets<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(buckets) = &self.inner.device else {
            return Ok(None);
        };
        let found = PyDict::new(py);
        for (name, bytes) in buckets.each() {
            found.set_item(name, bytes)?;
        }
        Ok(Some(found))
    }

    /// Elements in a tile that touches the disk.
    #[getter]
    fn tile_elements(&self) -> u64 {
        self.inner.tile_elements
    }

    /// Bytes of the staging ring.
    #[getter]
    fn staging_bytes(&self) -> u64 {
        self.inner.staging_bytes
    }

    /// Bytes of the frames for gathered units.
    #[getter]
    fn gathered_bytes(&self) -> u64 {
        self.inner.gathered_bytes
    }

    /// Bytes that this rank keeps on disk.
    #[getter]
    fn disk_bytes(&self) -> u64 {
        self.inner.placement.disk_bytes()
    }

    /// Bytes that a durable run takes on disk.
    #[getter]
    fn durable_bytes(&self) -> u64 {
        self.inner.placement.durable_bytes()
    }

    /// Bytes of `disk_bytes` that gradients take.
    #[getter]
    fn spilled_bytes(&self) -> u64 {
        self.inner.placement.gradients_on_disk()
    }

    /// Bytes that a step reads less, and those that it writes more, where backward updates before it is known whether the
    /// step clips, and it does not.
    #[getter]
    fn speculation_traffic(&self) -> (u64, u64) {
        self.inner.placement.speculation_traffic()
    }

    /// Bytes by bucket in every step.
    #[getter]
    fn buckets<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        by_name(py, &self.inner.buckets)
    }

    /// Bytes by bucket at the most: while initial values are filled in, or where a checkpoint is `loaded`, while that is.
    fn peak_buckets<'py>(&self, py: Python<'py>, loaded: bool) -> PyResult<Bound<'py, PyDict>> {
        by_name(py, &self.inner.peak_buckets(loaded))
    }

    /// Most resident bytes of the process in all steps, told after a first backward: `made` is the peak when training
    /// began, `peak` and `resident` are those of the process now, `heap_growth` is what heaps grew by since forward ended; `updated`
    /// says that backward has updated.
    fn expected_process(
        &self,
        made: u64,
        peak: u64,
        resident: u64,
        heap_growth: u64,
        loaded: bool,
        updated: bool,
    ) -> u64 {
        let passed = Passed {
            peak,
            resident,
            heap_growth,
            updated,
        };
        self.inner.expected_process(made, passed, loaded)
    }

    /// (read, written) bytes on disk in a step, when every module of the model runs once in a forward. `passes`: see
    /// `schedule`.
    #[pyo3(signature = (passes=Vec::new()))]
    fn disk_traffic(&self, passes: Vec<PassTuple>) -> (u64, u64) {
        let found = self.schedule(passes);
        (found.read_bytes, found.written_bytes)
    }

    /// (trainable, all) elements of each unit's flat layout, padding included.
    #[getter]
    fn padded(&self) -> Vec<(u64, u64)> {
        let units = self.inner.placement.units.iter();
        units
            .map(|unit| (unit.layout.trainable_len(), unit.layout.len()))
            .collect()
    }

    /// (start, bytes) of each unit's codes in the room for all of them; no bytes where its weights travel as they are.
    #[getter]
    fn codes(&self) -> Vec<(u64, u64)> {
        self.inner.placement.codes()
    }

    /// (start, bytes) of what each unit keeps for its next gradients, in the room for all of them.
    #[getter]
    fn residuals(&self) -> Vec<(u64, u64)> {
        self.inner.placement.residuals()
    }

    /// The collectives of a step: (phase, kind, unit, bytes that leave the rank, of them those that leave its shard group),
    /// in the order in which a rank begins them. `passes`: see `schedule`.
    #[pyo3(signature = (passes=Vec::new()))]
    fn collectives(
        &self,
        passes: Vec<PassTuple>,
    ) -> Vec<(&'static str, &'static str, usize, u64, u64)> {
        let row = |each: Collective| {
            let (phase, kind) = (each.phase.name(), each.kind.name());
            (phase, kind, each.unit, each.sent, each.across)
        };
        let found = self.schedule(passes).collectives;
        found.into_iter().map(row).collect()
    }

    /// Bytes that leave this rank in such a step, whatever carries them.
    #[pyo3(signature = (passes=Vec::new()))]
    fn sent_bytes(&self, passes: Vec<PassTuple>) -> u64 {
        self.schedule(passes).sent_bytes()
    }

    /// Of these the bytes that leave its shard group.
    #[pyo3(signature = (passes=Vec::new()))]
    fn across_bytes(&self, passes: Vec<PassTuple>) -> u64 {
        self.schedule(passes).across_bytes()
    }
}

/// (whether it goes back, the units that it uses, none for all)
type PassTuple = (bool, Vec<usize>);

impl PyPlan {
    /// A step in which the rank goes through `passes`; without any, forward and backward of one micro-batch.
    fn schedule(&self, passes: Vec<PassTuple>) -> Schedule {
        if passes.is_empty() {
            return Schedule::new(&self.inner);
        }
        let passes: Vec<_> = passes
            .into_iter()
            .map(|(backward, units)| Pass { backward, units })
            .collect();
        Schedule::of(&self.inner, &passes)
    }
}

fn by_name<'py>(py: Python<'py>, buckets: &Buckets) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for (name, bytes) in buckets.each() {
        found.set_item(name, bytes)?;
    }
    Ok(found)
}

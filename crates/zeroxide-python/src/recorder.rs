//! The recorder of an `Offload` for Python: on, off, and the events as numbers in a row.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use zeroxide_memory::{Activity, Event};
use zeroxide_offload::Offload;

use crate::errors::map;

/// Numbers in one event.
const NUMBERS: usize = 6;

/// Records what the core does and when, while it is on.
#[pyclass(frozen, module = "zeroxide._core", name = "Recorder")]
pub(crate) struct PyRecorder {
    inner: Arc<Offload>,
}

impl PyRecorder {
    pub(crate) fn new(inner: Arc<Offload>) -> Self {
        Self { inner }
    }
}

#[pymethods]
impl PyRecorder {
    /// Records the newest `events` events from now on; what was recorded before is forgotten. Raises `BudgetError`.
    fn start(&self, py: Python<'_>, events: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.start_recording(events)))
    }

    /// Ends it: (events, how many more there were); `None` where it was off. An event is six little-endian u64: its place
    /// in `ACTIVITIES`, begin, end, bytes, 0 or its unit and one, thread.
    fn stop<'py>(&self, py: Python<'py>) -> PyResult<Option<(Bound<'py, PyBytes>, u64)>> {
        let stopped = py.detach(|| {
            let recording = self.inner.stop_recording()?;
            Ok(recording.map(|recording| {
                let left_out = recording.left_out();
                (recording.events(), left_out)
            }))
        });
        let Some((events, left_out)) = map(py, stopped)? else {
            return Ok(None);
        };
        let size = NUMBERS * size_of::<u64>();
        let packed = PyBytes::new_with(py, events.len() * size, |bytes| {
            for (row, event) in bytes.chunks_exact_mut(size).zip(&events) {
                for (place, number) in row.chunks_exact_mut(size_of::<u64>()).zip(numbers(event)) {
                    place.copy_from_slice(&number.to_le_bytes());
                }
            }
            Ok(())
        })?;
        Ok(Some((packed, left_out)))
    }
}

fn numbers(event: &Event) -> [u64; NUMBERS] {
    [
        event.activity as u64,
        event.begin,
        event.end,
        event.bytes,
        event.unit.map_or(0, |unit| u64::from(unit) + 1),
        u64::from(event.thread),
    ]
}

/// What the numbers of activities mean.
pub(crate) fn activities() -> [&'static str; Activity::ALL.len()] {
    Activity::ALL.map(Activity::name)
}

//! What an `Offload` has counted, as dicts.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use zeroxide_memory::Bucket;
use zeroxide_offload::{IoReport, Offload};

/// Payload bytes per bucket: {name: (current, peak)}, and "total".
pub(crate) fn usage<'py>(py: Python<'py>, offload: &Offload) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    for bucket in Bucket::ALL {
        let usage = offload.usage(bucket);
        result.set_item(bucket.name(), (usage.current, usage.peak))?;
    }
    let total = offload.total_usage();
    result.set_item("total", (total.current, total.peak))?;
    Ok(result)
}

/// Disk traffic: bytes, operations, seconds, and the engine.
pub(crate) fn io<'py>(py: Python<'py>, report: &IoReport) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    let counters = &report.counters;
    result.set_item("read_bytes", counters.read.bytes)?;
    result.set_item("write_bytes", counters.write.bytes)?;
    result.set_item("reads", counters.read.operations)?;
    result.set_item("writes", counters.write.operations)?;
    result.set_item("read_seconds", counters.read.busy.as_secs_f64())?;
    result.set_item("write_seconds", counters.write.busy.as_secs_f64())?;
    result.set_item("wait_seconds", report.waited.as_secs_f64())?;
    result.set_item("update_seconds", report.updating.as_secs_f64())?;
    result.set_item("tiles_updated", report.tiles)?;
    result.set_item("engine", &report.engine)?;
    Ok(result)
}

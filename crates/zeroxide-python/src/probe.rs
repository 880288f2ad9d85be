//! What this machine has: its processor's instructions, and the speed of a disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pyo3::prelude::*;
use zeroxide_memory::{Arena, Bucket, Budget};
use zeroxide_offload::OffloadError;
use zeroxide_storage::{DIRECT_ALIGN, DiskSpeed, measure_disk};

use crate::errors::map;

/// Size of a request, and how many of them are in flight.
const BLOCK: usize = 1 << 20;
const DEPTH: usize = 16;

/// The instruction set that the kernels run on: "baseline", "avx2" or "avx512".
#[pyfunction]
pub(crate) fn instruction_set() -> &'static str {
    zeroxide_optim::isa().name()
}

/// What the disk of a directory can do.
#[pyclass(frozen, get_all, module = "zeroxide._core", name = "DiskSpeed")]
pub(crate) struct PyDiskSpeed {
    /// The engine of the queue and why it was chosen.
    engine: String,
    /// Whether transfers bypass the page cache.
    direct: bool,
    /// Bytes a second.
    write: f64,
    /// Bytes a second.
    read: f64,
}

#[expect(clippy::cast_precision_loss, reason = "sizes below 2^53 bytes")]
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64().max(1e-9)
}

fn measured(directory: &Path, bytes: u64, limit: Duration) -> Result<DiskSpeed, OffloadError> {
    let arena = Arena::new(&Budget::new(None), Bucket::Staging, BLOCK * DEPTH)?;
    let leases = (0..DEPTH).map(|_| arena.lease(BLOCK, DIRECT_ALIGN));
    let buffers = leases.collect::<Result<Vec<_>, _>>()?;
    Ok(measure_disk(directory, bytes, limit, buffers)?)
}

/// Writes and reads a temporary file of at most `nbytes` in `directory`, each for at most about `seconds`.
#[pyfunction]
#[pyo3(name = "measure_disk")]
pub(crate) fn measure(
    py: Python<'_>,
    directory: PathBuf,
    nbytes: u64,
    seconds: f64,
) -> PyResult<PyDiskSpeed> {
    let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
    let found = map(py, py.detach(move || measured(&directory, nbytes, limit)))?;
    Ok(PyDiskSpeed {
        engine: found.engine,
        direct: found.direct,
        write: rate(found.write.bytes, found.write.took),
        read: rate(found.read.bytes, found.read.took),
    })
}

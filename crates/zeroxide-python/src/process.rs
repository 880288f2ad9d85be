//! What concerns the process as a whole.

use std::io;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::spec::TensorSpec;

/// An `OSError` with the system's code as `errno`.
#[expect(clippy::needless_pass_by_value, reason = "the shape of `map_err`")]
fn refused(error: io::Error) -> PyErr {
    PyOSError::new_err((error.raw_os_error(), error.to_string()))
}

/// Resident memory of this process in bytes, as the operating system counts it: rss, anon, file, peak.
#[pyfunction]
pub(crate) fn resident(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = zeroxide_memory::resident_bytes().map_err(refused)?;
    let result = PyDict::new(py);
    result.set_item("rss", found.rss)?;
    result.set_item("anon", found.anon)?;
    result.set_item("file", found.file)?;
    result.set_item("peak", found.peak)?;
    Ok(result)
}

/// Makes the present resident memory the peak that `resident` tells; whether the system let it.
#[pyfunction]
pub(crate) fn reset_peak() -> bool {
    zeroxide_memory::reset_peak().is_ok()
}

/// Bytes that the C allocator has taken for its heaps, in use or free; 0 where it cannot be asked.
#[pyfunction]
pub(crate) fn heap_bytes() -> u64 {
    zeroxide_memory::heap_bytes()
}

/// Tells the C allocator to keep freed memory in the process, but for blocks of `largest` bytes and more; whether it
/// could be told.
#[pyfunction]
#[pyo3(signature = (largest=None))]
pub(crate) fn keep_freed_memory(largest: Option<i32>) -> bool {
    zeroxide_memory::keep_freed_memory(largest)
}

/// Takes pages that are nothing but a file's, of a tensor of bytes that nobody else uses during the call, out of the
/// resident set; they come back when they are read. Returns the bytes dropped.
#[pyfunction]
pub(crate) fn drop_pages_of_files(py: Python<'_>, tensor: &TensorSpec) -> PyResult<u64> {
    let bytes = tensor.bytes_mut()?;
    py.detach(|| zeroxide_memory::drop_pages_of_files(bytes))
        .map_err(refused)
}

/// Drops clean pages of shared libraries from the resident set; they come back from the page cache when needed.
/// Returns the bytes dropped.
#[pyfunction]
pub(crate) fn drop_clean_text(py: Python<'_>) -> PyResult<u64> {
    py.detach(zeroxide_memory::drop_clean_text).map_err(refused)
}

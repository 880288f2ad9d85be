//! Memory of the core as what Python's buffer protocol asks for.
//!
//! `unsafe` is at home here: filling in a `Py_buffer`.

use std::ffi::{c_int, c_void};
use std::ptr;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Fills in the `__getbuffer__` of `owner`: `nbytes` writable bytes from `address` on. Raises `BufferError`.
///
/// # Safety
///
/// `view` is null or what Python passed to be filled in, and the memory is there for as long as `owner` is.
pub(crate) unsafe fn fill(
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    address: usize,
    nbytes: usize,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill in"));
    }
    let length =
        isize::try_from(nbytes).map_err(|error| PyBufferError::new_err(error.to_string()))?;
    let memory = ptr::with_exposed_provenance_mut::<c_void>(address);
    // SAFETY: the caller's promise; the view holds a reference to the owner.
    let filled = unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), memory, length, 0, flags) };
    if filled == 0 {
        Ok(())
    } else {
        Err(PyErr::fetch(owner.py()))
    }
}

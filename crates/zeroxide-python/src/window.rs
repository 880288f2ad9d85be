//! A unit's flat weights as a Python buffer, from which torch makes its tensors.
//!
//! `unsafe` is at home here: filling in a `Py_buffer`.

use std::ffi::{c_int, c_void};
use std::ptr;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use zeroxide_memory::Anchor;

/// The address range of one unit's flat weights. Readable only while the unit is gathered.
#[pyclass(frozen, module = "zeroxide._core", name = "Window")]
pub(crate) struct PyWindow {
    address: usize,
    bytes: usize,
    /// Keeps the range reserved for as long as any tensor refers to it.
    _anchor: Anchor,
}

impl From<(usize, usize, Anchor)> for PyWindow {
    fn from((address, bytes, anchor): (usize, usize, Anchor)) -> Self {
        Self {
            address,
            bytes,
            _anchor: anchor,
        }
    }
}

#[pymethods]
impl PyWindow {
    /// First address of the range.
    #[getter]
    fn address(&self) -> usize {
        self.address
    }

    /// Bytes of the unit's weights.
    #[getter]
    fn nbytes(&self) -> usize {
        self.bytes
    }

    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill in"));
        }
        let this = slf.get();
        let length = isize::try_from(this.bytes)
            .map_err(|error| PyBufferError::new_err(error.to_string()))?;
        // SAFETY: Python passes a view to be filled in. The address range outlives it: the view holds a reference to
        // this object, and this object holds the anchor.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                ptr::with_exposed_provenance_mut::<c_void>(this.address),
                length,
                0,
                flags,
            )
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}

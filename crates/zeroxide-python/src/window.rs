//! A unit's flat weights as a Python buffer, from which torch makes its tensors.
//!
//! `unsafe` is at home here: what `buffer::fill` is promised.

use std::ffi::c_int;

use pyo3::ffi;
use pyo3::prelude::*;
use zeroxide_memory::Anchor;

use crate::buffer;

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
        let this = slf.get();
        // SAFETY: Python passes the view; this object holds the anchor, which keeps the range.
        unsafe { buffer::fill(slf.as_any(), view, this.address, this.bytes, flags) }
    }
}

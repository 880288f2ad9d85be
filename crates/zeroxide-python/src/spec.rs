//! A tensor's memory as Rust sees it.
//!
//! `unsafe` is at home here: the invariant of every block is the one of [`TensorSpec`].

use std::slice;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::Dtype;
use zeroxide_memory::Lease;
use zeroxide_optim::Grad;

/// Address, length and dtype of a contiguous CPU tensor, and the tensor itself, which keeps the memory alive.
///
/// Invariant, kept by the one Python function that makes specs (`zeroxide.zero.tensors.spec`): `data_ptr` is the
/// start of `numel` elements of `dtype` in host memory that `owner` keeps alive, and nobody else touches them during
/// the call that the spec is passed to.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct TensorSpec {
    owner: Py<PyAny>,
    data_ptr: usize,
    numel: usize,
    dtype: Dtype,
}

#[pymethods]
impl TensorSpec {
    #[new]
    #[pyo3(signature = (*, owner, data_ptr, numel, dtype))]
    fn new(owner: Py<PyAny>, data_ptr: usize, numel: usize, dtype: &str) -> PyResult<Self> {
        let dtype = Dtype::parse(dtype).map_err(|error| PyValueError::new_err(error.to_string()))?;
        if data_ptr == 0 && numel > 0 {
            return Err(PyValueError::new_err(format!("null data pointer for {numel} elements")));
        }
        if data_ptr % dtype.size() != 0 {
            return Err(PyValueError::new_err(format!("data pointer {data_ptr:#x} is not aligned to {}", dtype.name())));
        }
        Ok(Self { owner, data_ptr, numel, dtype })
    }
}

impl TensorSpec {
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn elements<T>(&self) -> &[T] {
        if self.numel == 0 {
            return &[];
        }
        // SAFETY: the invariant of `TensorSpec`; callers pick `T` of the spec's dtype size, checked in `new` for
        // alignment. The slice lives no longer than `self`, which holds the owner.
        unsafe { slice::from_raw_parts(self.data_ptr as *const T, self.numel) }
    }

    /// The elements as a gradient.
    pub(crate) fn grad(&self) -> Grad<'_> {
        match self.dtype {
            Dtype::F32 => Grad::F32(self.elements()),
            Dtype::Bf16 => Grad::Bf16(self.elements()),
            Dtype::F16 => Grad::F16(self.elements()),
        }
    }

    /// The elements as fp32.
    pub(crate) fn f32(&self) -> PyResult<&[f32]> {
        self.check_f32()?;
        Ok(self.elements())
    }

    /// The elements as fp32, to be written.
    #[expect(clippy::mut_from_ref, reason = "the memory is the tensor's, not the spec's; see the invariant")]
    pub(crate) fn f32_mut(&self) -> PyResult<&mut [f32]> {
        self.check_f32()?;
        if self.numel == 0 {
            return Ok(&mut []);
        }
        // SAFETY: the invariant of `TensorSpec`: nobody else touches the elements during the call, and each call
        // makes at most one slice of each spec.
        Ok(unsafe { slice::from_raw_parts_mut(self.data_ptr as *mut f32, self.numel) })
    }

    /// The memory as a lease that keeps the tensor alive.
    pub(crate) fn lease(&self, py: Python<'_>) -> Lease {
        let owner = self.owner.clone_ref(py);
        let bytes = self.numel * self.dtype.size();
        // SAFETY: the invariant of `TensorSpec`; the lease holds the owner until it is dropped, and the Python side
        // does not touch the tensor before the step that it was lent for has returned.
        unsafe { Lease::foreign(self.data_ptr as *mut u8, bytes, Box::new(owner)) }
    }

    fn check_f32(&self) -> PyResult<()> {
        if self.dtype == Dtype::F32 {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("expected an fp32 tensor, got {}", self.dtype.name())))
    }
}

//! A tensor's memory as Rust sees it.
//!
//! `unsafe` is at home here: the invariant of every block is the one of [`TensorSpec`].

use std::slice;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_layout::Dtype;
use zeroxide_memory::Lease;
use zeroxide_optim::Grad;

use crate::errors::to_python;

/// Address, length and dtype of a contiguous CPU tensor, and the tensor itself, which keeps the memory alive.
///
/// Invariant, kept by the one Python function that makes specs (`zeroxide.device.placement.spec`): `data_ptr` is the
/// start of `numel` elements of `dtype` in host memory that `owner` keeps alive, and nobody else touches them during
/// the call that the spec is passed to.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct TensorSpec {
    owner: Py<PyAny>,
    data_ptr: usize,
    numel: usize,
    dtype: Element,
}

/// What the memory holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Element {
    Float(Dtype),
    Int64,
    Byte,
}

impl Element {
    fn size(self) -> usize {
        match self {
            Element::Float(dtype) => dtype.size(),
            Element::Int64 => size_of::<i64>(),
            Element::Byte => size_of::<u8>(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Element::Float(dtype) => dtype.name(),
            Element::Int64 => "int64",
            Element::Byte => "uint8",
        }
    }
}

#[pymethods]
impl TensorSpec {
    #[new]
    #[pyo3(signature = (owner, data_ptr, numel, dtype, /))]
    fn new(
        py: Python<'_>,
        owner: Py<PyAny>,
        data_ptr: usize,
        numel: usize,
        dtype: &str,
    ) -> PyResult<Self> {
        let dtype = match dtype {
            "int64" => Element::Int64,
            "uint8" => Element::Byte,
            name => Element::Float(Dtype::parse(name).map_err(|error| to_python(py, &error))?),
        };
        if data_ptr == 0 && numel > 0 {
            return Err(PyValueError::new_err(format!(
                "null data pointer for {numel} elements"
            )));
        }
        if !data_ptr.is_multiple_of(dtype.size()) {
            return Err(PyValueError::new_err(format!(
                "data pointer {data_ptr:#x} is not aligned to {}",
                dtype.name()
            )));
        }
        Ok(Self {
            owner,
            data_ptr,
            numel,
            dtype,
        })
    }
}

impl TensorSpec {
    /// The dtype of a tensor of floats.
    pub(crate) fn float(&self) -> PyResult<Dtype> {
        match self.dtype {
            Element::Float(dtype) => Ok(dtype),
            Element::Int64 | Element::Byte => Err(PyValueError::new_err(format!(
                "expected a tensor of floats, got {}",
                self.dtype.name()
            ))),
        }
    }

    /// The elements as int64.
    pub(crate) fn i64(&self) -> PyResult<&[i64]> {
        self.check(Element::Int64)?;
        Ok(self.elements())
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
    pub(crate) fn grad(&self) -> PyResult<Grad<'_>> {
        Ok(match self.float()? {
            Dtype::F32 => Grad::F32(self.elements()),
            Dtype::Bf16 => Grad::Bf16(self.elements()),
            Dtype::F16 => Grad::F16(self.elements()),
        })
    }

    /// The elements as fp32.
    pub(crate) fn f32(&self) -> PyResult<&[f32]> {
        self.check(Element::Float(Dtype::F32))?;
        Ok(self.elements())
    }

    /// The elements as fp32, to be written.
    pub(crate) fn f32_mut(&self) -> PyResult<&mut [f32]> {
        self.check(Element::Float(Dtype::F32))?;
        Ok(self.elements_mut())
    }

    /// The elements as bytes.
    pub(crate) fn bytes(&self) -> PyResult<&[u8]> {
        self.check(Element::Byte)?;
        Ok(self.elements())
    }

    /// The elements as bytes, to be written.
    pub(crate) fn bytes_mut(&self) -> PyResult<&mut [u8]> {
        self.check(Element::Byte)?;
        Ok(self.elements_mut())
    }

    /// The elements as bf16 bits, to be written.
    pub(crate) fn bf16_mut(&self) -> PyResult<&mut [u16]> {
        self.check(Element::Float(Dtype::Bf16))?;
        Ok(self.elements_mut())
    }

    #[expect(
        clippy::mut_from_ref,
        reason = "the memory is the tensor's, not the spec's; see the invariant"
    )]
    fn elements_mut<T>(&self) -> &mut [T] {
        if self.numel == 0 {
            return &mut [];
        }
        // SAFETY: the invariant of `TensorSpec`: nobody else touches the elements during the call, and each call
        // makes at most one slice of each spec; callers pick `T` of the spec's dtype, which they have checked.
        unsafe { slice::from_raw_parts_mut(self.data_ptr as *mut T, self.numel) }
    }

    /// The memory as a lease that keeps the tensor alive.
    pub(crate) fn lease(&self, py: Python<'_>) -> Lease {
        let owner = self.owner.clone_ref(py);
        let bytes = self.numel * self.dtype.size();
        // SAFETY: the invariant of `TensorSpec`; the lease holds the owner until it is dropped, and the Python side
        // does not touch the tensor before the step that it was lent for has returned.
        unsafe { Lease::foreign(self.data_ptr as *mut u8, bytes, Arc::new(owner)) }
    }

    fn check(&self, expected: Element) -> PyResult<()> {
        if self.dtype == expected {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "expected a {} tensor, got {}",
            expected.name(),
            self.dtype.name()
        )))
    }
}

/// A checksum of the bytes: equal bytes have equal ones, and others with a chance of 2^-64.
#[pyfunction]
#[pyo3(signature = (bytes, /))]
pub(crate) fn checksum(py: Python<'_>, bytes: &TensorSpec) -> PyResult<u64> {
    let bytes = bytes.bytes()?;
    Ok(py.detach(|| zeroxide_storage::checksum(bytes)))
}

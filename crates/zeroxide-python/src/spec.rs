//! A tensor's memory as Rust sees it.
//!
//! `unsafe` is at home here: the invariant of every block is the one of [`TensorSpec`].

use std::slice;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use zeroxide_layout::Dtype;
use zeroxide_memory::Lease;
use zeroxide_offload::Concern;
use zeroxide_optim::Grad;

use crate::dlpack;
use crate::errors::raise;

/// Address, length and dtype of a contiguous CPU tensor, and the tensor itself, which keeps the memory alive.
///
/// Invariant: `data_ptr` is the start of `numel` elements of `dtype` in host memory that `owner` keeps alive, which
/// [`TensorSpec::of`] has from the tensor itself; and nobody else touches them during the call that the spec is passed
/// to, which those see to that call into the core.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct TensorSpec {
    owner: Py<PyAny>,
    data_ptr: usize,
    numel: usize,
    dtype: Element,
}

/// What the memory holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
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

/// torch's own objects that a tensor is compared with.
struct Torch {
    dtypes: [(Py<PyAny>, Element); 5],
    strided: Py<PyAny>,
}

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let named = |name| torch.getattr(name).map(Bound::unbind);
            Ok(Self {
                dtypes: [
                    (named("bfloat16")?, Element::Float(Dtype::Bf16)),
                    (named("float32")?, Element::Float(Dtype::F32)),
                    (named("float16")?, Element::Float(Dtype::F16)),
                    (named("int64")?, Element::Int64),
                    (named("uint8")?, Element::Byte),
                ],
                strided: named("strided")?,
            })
        })
    }
}

#[pymethods]
impl TensorSpec {
    /// Raises `ModelError` when the tensor is not contiguous, not in host memory, not fp32, bf16, fp16, int64 or uint8,
    /// or has its negative bit set.
    #[new]
    #[pyo3(signature = (tensor, /))]
    fn new(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Some(spec) = Self::of(tensor)? {
            return Ok(spec);
        }
        let py = tensor.py();
        let found = |name| tensor.getattr(name);
        let strides = if !found("layout")?.is(&Torch::get(py)?.strided) {
            format!("layout {}", found("layout")?)
        } else if tensor.call_method0("is_neg")?.is_truthy()? {
            "its negative bit set: resolve_neg() first".to_owned()
        } else {
            format!("strides {}", tensor.call_method0("stride")?)
        };
        let line = format!(
            "expected a contiguous fp32, bf16, fp16, int64 or uint8 tensor in host memory, got {} {} on {} with {strides}",
            found("dtype")?,
            py.get_type::<PyTuple>().call1((found("shape")?,))?,
            found("device")?,
        );
        Err(raise(py, Concern::Model, &line, &[]))
    }

    /// The tensor itself.
    #[getter]
    fn tensor(&self, py: Python<'_>) -> Py<PyAny> {
        self.owner.clone_ref(py)
    }
}

impl TensorSpec {
    /// The memory of a tensor, any shape; `None` where it is not what the core can take.
    pub(crate) fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = tensor.py();
        let found = match dlpack::memory_of(tensor)? {
            Some(found) => Some(found),
            None => Self::asked(tensor)?,
        };
        let Some((data_ptr, numel, dtype)) = found else {
            return Ok(None);
        };
        // Its memory holds the values' opposites.
        if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            return Ok(None);
        }
        if data_ptr == 0 && numel > 0 || !data_ptr.is_multiple_of(dtype.size()) {
            return Err(PyValueError::new_err(format!(
                "{numel} elements of {} at {data_ptr:#x}: not an aligned address",
                dtype.name()
            )));
        }
        Ok(Some(Self {
            owner: tensor.clone().unbind(),
            data_ptr,
            numel,
            dtype,
        }))
    }

    /// Address, elements and dtype as the tensor's attributes give them, one by one.
    fn asked(tensor: &Bound<'_, PyAny>) -> PyResult<Option<(usize, usize, Element)>> {
        let py = tensor.py();
        let torch = Torch::get(py)?;
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        let known = torch.dtypes.iter().find(|(each, _)| dtype.is(each));
        let Some((_, element)) = known else {
            return Ok(None);
        };
        if !tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()?
            || !tensor.getattr(intern!(py, "layout"))?.is(&torch.strided)
            || !tensor
                .call_method0(intern!(py, "is_contiguous"))?
                .is_truthy()?
        {
            return Ok(None);
        }
        let data_ptr: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let numel: usize = tensor.call_method0(intern!(py, "numel"))?.extract()?;
        Ok(Some((data_ptr, numel, *element)))
    }

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
        // SAFETY: the invariant of `TensorSpec`; callers pick `T` of the spec's dtype size, checked in `of` for
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

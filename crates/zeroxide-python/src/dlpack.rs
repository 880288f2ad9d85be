//! A tensor's memory, dtype and shape from torch in one call: the C functions of `DLPack`'s exchange interface.
//!
//! `unsafe` is at home here: calling a C function that torch hands out, and reading what it has filled in. Layouts are
//! those of `DLPack` 1 (`dmlc/dlpack`, `include/dlpack/dlpack.h`); a later major version may have others and is not used.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};
use std::slice;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use zeroxide_layout::Dtype;

use crate::spec::Element;

const NAME: &CStr = c"dlpack_exchange_api";
const MAJOR: u32 = 1;
const CPU: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct Device {
    kind: i32,
    index: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type FromObject = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// What a table of any version begins with.
#[repr(C)]
struct Header {
    major: u32,
    minor: u32,
    previous: Option<NonNull<Header>>,
}

#[repr(C)]
struct Exchange {
    header: Header,
    allocate: *const c_void,
    managed_from_object: *const c_void,
    managed_to_object: *const c_void,
    from_object: Option<FromObject>,
    current_stream: *const c_void,
}

/// What torch has for its tensors, if it has that.
struct Torch {
    /// `torch.Tensor` itself: what a subclass shows need not be its memory.
    class: Py<PyType>,
    from_object: Option<FromObject>,
}

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let class = py
                .import("torch")?
                .getattr("Tensor")?
                .cast_into::<PyType>()?;
            let capsule = class
                .getattr_opt("__dlpack_c_exchange_api__")?
                .and_then(|found| found.cast_into::<PyCapsule>().ok());
            let from_object = match capsule {
                Some(capsule) => function(capsule.pointer_checked(Some(NAME))?.cast()),
                None => None,
            };
            Ok(Self {
                class: class.unbind(),
                from_object,
            })
        })
    }
}

/// The function of the first table of the version that is known here.
fn function(first: NonNull<Header>) -> Option<FromObject> {
    let mut next = Some(first);
    while let Some(table) = next {
        // SAFETY: torch keeps its tables for the life of the process, and every version of DLPack begins a table with
        // this header.
        let header = unsafe { table.as_ref() };
        if header.major == MAJOR {
            // SAFETY: as above, and a table of this version has this layout.
            return unsafe { table.cast::<Exchange>().as_ref() }.from_object;
        }
        next = header.previous;
    }
    None
}

/// Address, elements and dtype of what is exactly a `torch.Tensor`, contiguous and in host memory. `None` where the
/// tensor is anything else, or torch has no such function: then the tensor's own attributes say what it is.
pub(crate) fn memory_of(tensor: &Bound<'_, PyAny>) -> PyResult<Option<(usize, usize, Element)>> {
    let torch = Torch::get(tensor.py())?;
    let Some(from_object) = torch.from_object else {
        return Ok(None);
    };
    if !tensor.get_type().is(&torch.class) {
        return Ok(None);
    }
    let mut found = Tensor {
        data: ptr::null_mut(),
        device: Device { kind: 0, index: 0 },
        ndim: 0,
        dtype: DataType {
            code: 0,
            bits: 0,
            lanes: 0,
        },
        shape: ptr::null(),
        strides: ptr::null(),
        byte_offset: 0,
    };
    // SAFETY: the object is a `torch.Tensor`, the class that the function was taken from, and Python is attached; the
    // function fills in `found` or sets an exception.
    let failed = unsafe { from_object(tensor.as_ptr().cast(), &raw mut found) } != 0;
    if failed {
        // Sparse and meta tensors have no memory to describe.
        drop(PyErr::take(tensor.py()));
        return Ok(None);
    }
    let Some(element) = element(found.dtype) else {
        return Ok(None);
    };
    if found.device.kind != CPU || found.byte_offset != 0 {
        return Ok(None);
    }
    let ndim = usize::try_from(found.ndim).unwrap_or(0);
    let (shape, strides) = if ndim == 0 {
        (&[][..], &[][..])
    } else {
        // SAFETY: torch's arrays of `ndim` elements, which live as long as the tensor is not changed: nobody can run
        // Python code before they have been read.
        let shape = unsafe { slice::from_raw_parts(found.shape, ndim) };
        // SAFETY: as the shape; the function always fills in strides.
        (shape, unsafe { slice::from_raw_parts(found.strides, ndim) })
    };
    Ok(contiguous(shape, strides).map(|numel| (found.data as usize, numel, element)))
}

/// The elements of a tensor that has no gaps; `None` where it has some.
fn contiguous(shape: &[i64], strides: &[i64]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != expected {
            return None;
        }
        expected *= size;
    }
    usize::try_from(expected).ok()
}

fn element(dtype: DataType) -> Option<Element> {
    match (dtype.code, dtype.bits, dtype.lanes) {
        (4, 16, 1) => Some(Element::Float(Dtype::Bf16)),
        (2, 32, 1) => Some(Element::Float(Dtype::F32)),
        (2, 16, 1) => Some(Element::Float(Dtype::F16)),
        (0, 64, 1) => Some(Element::Int64),
        (1, 8, 1) => Some(Element::Byte),
        _ => None,
    }
}

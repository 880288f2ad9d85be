//! The checksum of a file that Python writes or reads part by part.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use zeroxide_storage::RunningChecksum;

use crate::spec::TensorSpec;

/// CRC-64/NVME of the bytes that came so far.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct FileChecksum(Mutex<RunningChecksum>);

#[pymethods]
impl FileChecksum {
    #[new]
    fn new() -> Self {
        Self(Mutex::new(RunningChecksum::new()))
    }

    /// Takes in what comes next.
    fn update(&self, py: Python<'_>, bytes: &TensorSpec) -> PyResult<()> {
        let bytes = bytes.bytes()?;
        py.detach(|| {
            let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            running.update(bytes);
        });
        Ok(())
    }

    /// Copies what comes next and takes it in. Raises `ValueError` where there is not room for as many bytes, or where
    /// the two share memory.
    fn copy(&self, py: Python<'_>, bytes: &TensorSpec, into: &TensorSpec) -> PyResult<()> {
        let (from, room) = (bytes.bytes()?.as_ptr_range(), into.bytes()?.as_ptr_range());
        if bytes.bytes()?.len() != into.bytes()?.len() {
            return Err(PyValueError::new_err(format!(
                "expected room for {} bytes, got room for {}",
                bytes.bytes()?.len(),
                into.bytes()?.len()
            )));
        }
        if from.start < room.end && room.start < from.end {
            return Err(PyValueError::new_err(
                "what is copied and where it goes share memory",
            ));
        }
        let (from, room) = (bytes.bytes()?, into.bytes_mut()?);
        py.detach(|| {
            let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            running.copy(from, room);
        });
        Ok(())
    }

    /// Of all that was taken in, as 16 hexadecimal digits.
    fn hexdigest(&self) -> String {
        let running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        format!("{:016x}", running.value())
    }
}

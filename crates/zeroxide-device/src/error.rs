//! What can go wrong on a device.

use thiserror::Error;
use zeroxide_memory::MemoryError;

use crate::cuda::CudaError;

/// Failures of a device.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An NVIDIA device, its driver or its compiler.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A copy that does not fit into the device's memory.
    #[error("a copy of {count} bytes at byte {at} leaves device memory of {size} bytes")]
    OutOfRange {
        /// First byte on the device.
        at: usize,
        /// Bytes of the copy.
        count: usize,
        /// Bytes of the device's memory.
        size: usize,
    },
}

/// Short form of every result here.
pub type Result<T> = std::result::Result<T, DeviceError>;

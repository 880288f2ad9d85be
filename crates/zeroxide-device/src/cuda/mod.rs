//! NVIDIA's devices: the driver and the compiler are loaded while the program runs, and a machine without them is no
//! error before they are asked for.
//!
//! A [`Context`] is the part that this process takes in a device's primary context, which is the one that torch uses:
//! memory and streams of either are the other's as well. A context is a [`Device`](crate::Device) like the host, and
//! makes [`Kernel`]s of [`Cubin`]s. A [`Compiler`] makes those of [`Source`]s, and a [`Cache`] keeps them; [`read_cubin`] takes
//! one that was made where the library was built. [`probe_storage`] tells whether a file could be read without host memory.

mod cache;
mod compile;
mod context;
mod error;
mod kept;
mod memory;
mod sources;
mod storage;
mod sys;

pub use cache::Cache;
pub use compile::{Compiled, Compiler, Cubin, OPTIONS, Source};
pub use context::{Context, DRIVER, Kernel, KernelUse, Probe, probe};
pub use error::{CudaError, Version};
pub use kept::{Kept, read_cubin};
pub use memory::{CudaEvent, CudaMemory, CudaStream};
pub use sources::{headers, names, source};
pub use storage::probe_storage;
pub use sys::kernel::Grid;

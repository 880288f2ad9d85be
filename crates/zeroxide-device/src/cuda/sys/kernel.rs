//! Machine code that is loaded, and starting it.
#![expect(
    unsafe_code,
    reason = "calls into NVIDIA's driver with kernels that are loaded here"
)]

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use super::driver::{KernelAttribute, code};
use super::owned::Primary;
use crate::cuda::error::{CudaError, Result};

/// The first word of the list by which a launch takes its argument as bytes, the second, and its end.
const ARGUMENT_ADDRESS: usize = 1;
const ARGUMENT_BYTES: usize = 2;
const ARGUMENT_END: usize = 0;
/// Dynamic shared memory that every kernel may have without asking, in bytes.
const USUAL_SHARED_BYTES: u32 = 48 << 10;

/// A loaded file of machine code with one kernel that is used of it.
#[derive(Debug)]
pub(crate) struct LoadedKernel {
    context: Arc<Primary>,
    module: usize,
    handle: usize,
    entry: String,
    argument_bytes: Option<u64>,
}

/// Why a kernel could not be loaded: the driver's words, of the file or of the entry.
pub(crate) enum NotLoaded {
    File(String),
    Entry,
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

impl LoadedKernel {
    /// Loads `image`, a whole file of machine code, and finds `entry` in it.
    pub(crate) fn new(
        context: Arc<Primary>,
        image: &[u8],
        entry: &CString,
    ) -> Result<std::result::Result<Self, NotLoaded>> {
        let current = context.enter()?;
        let module = match context.driver.load_module(image) {
            Ok(module) => module,
            Err(code::OUT_OF_MEMORY) => {
                let (free, total) = context.driver.memory();
                return Err(CudaError::OutOfMemory {
                    what: "machine code",
                    need: image.len() as u64,
                    free,
                    total,
                    device: context.number,
                });
            }
            Err(status) => return Ok(Err(NotLoaded::File(context.driver.reason(status)))),
        };
        let found = context.driver.kernel(module, entry);
        drop(current);
        let mut loaded = Self {
            context,
            module,
            handle: 0,
            entry: entry.to_string_lossy().into_owned(),
            argument_bytes: None,
        };
        match found {
            Ok(handle) => loaded.handle = handle,
            Err(code::NOT_FOUND) => return Ok(Err(NotLoaded::Entry)),
            Err(status) => return Ok(Err(NotLoaded::File(loaded.context.driver.reason(status)))),
        }
        let current = loaded.context.enter()?;
        let argument_bytes = loaded.context.driver.argument_bytes(loaded.handle);
        drop(current);
        loaded.argument_bytes = argument_bytes;
        Ok(Ok(loaded))
    }

    /// What the driver says of the kernel.
    pub(crate) fn attribute(&self, which: KernelAttribute) -> Result<u32> {
        let _current = self.context.enter()?;
        let mut found = 0;
        // SAFETY: the function fills in one number for a kernel that is loaded.
        let status = unsafe {
            (self.context.driver.functions.kernel_attribute)(
                &raw mut found,
                which as c_int,
                self.handle,
            )
        };
        self.context.check("cuFuncGetAttribute", status)?;
        Ok(u32::try_from(found).unwrap_or(0))
    }

    /// Bytes of its argument, where the driver tells.
    pub(crate) fn argument_bytes(&self) -> Option<u64> {
        self.argument_bytes
    }

    /// Starts the kernel on `stream`, a handle of the same context or 0 for its default stream; returns before it ends.
    ///
    /// # Safety
    /// `argument` is the kernel's struct; the memory that its pointers point to is there, as large as the kernel takes it
    /// for, until the kernel has ended, and nothing else that runs meanwhile writes what the kernel uses or reads what
    /// it writes. `stream` is a stream that is there.
    pub(crate) unsafe fn launch(&self, grid: Grid, stream: usize, argument: &[u8]) -> Result<()> {
        if let Some(expected) = self.argument_bytes
            && expected != argument.len() as u64
        {
            return Err(CudaError::Arguments {
                entry: self.entry.clone(),
                expected,
                got: argument.len() as u64,
            });
        }
        let _current = self.context.enter()?;
        let functions = &self.context.driver.functions;
        if grid.shared_bytes > USUAL_SHARED_BYTES {
            let bytes = c_int::try_from(grid.shared_bytes).unwrap_or(c_int::MAX);
            let which = KernelAttribute::MaxDynamicSharedBytes as c_int;
            // SAFETY: the kernel is loaded; a size that the device lacks is refused.
            let status = unsafe { (functions.set_kernel_attribute)(self.handle, which, bytes) };
            self.accept(grid, stream, status)?;
        }
        // A size that is not the kernel's is refused by drivers that tell no size; they never write these bytes.
        let mut bytes = argument.len();
        let mut list: [*mut c_void; 5] = [
            std::ptr::without_provenance_mut(ARGUMENT_ADDRESS),
            argument.as_ptr().cast_mut().cast(),
            std::ptr::without_provenance_mut(ARGUMENT_BYTES),
            (&raw mut bytes).cast(),
            std::ptr::without_provenance_mut(ARGUMENT_END),
        ];
        // SAFETY: the kernel is loaded and stays so until `self` is dropped; the driver reads the list and the argument
        // before it returns. The rest is the caller's promise.
        let status = unsafe {
            (functions.launch)(
                self.handle,
                grid.blocks,
                1,
                1,
                grid.threads,
                1,
                1,
                grid.shared_bytes,
                stream,
                std::ptr::null_mut(),
                list.as_mut_ptr(),
            )
        };
        self.accept(grid, stream, status)
    }

    fn accept(&self, grid: Grid, stream: usize, status: c_int) -> Result<()> {
        let Err(error) = self.context.check("cuLaunchKernel", status) else {
            return Ok(());
        };
        Err(match error {
            CudaError::Driver { reason, .. }
                if [code::INVALID_HANDLE, code::INVALID_CONTEXT].contains(&status) =>
            {
                CudaError::Handle {
                    what: "stream",
                    handle: stream as u64,
                    device: self.context.number,
                    reason,
                }
            }
            CudaError::Driver { reason, .. } => CudaError::Launch {
                entry: self.entry.clone(),
                blocks: grid.blocks.into(),
                threads: grid.threads,
                shared_bytes: grid.shared_bytes,
                stream: stream as u64,
                device: self.context.number,
                reason,
            },
            other => other,
        })
    }
}

impl Drop for LoadedKernel {
    fn drop(&mut self) {
        self.context.end(|| {
            // Kernels of the module that run end with it.
            self.context.wait();
            // SAFETY: `new` has loaded the module, and it is unloaded once, with no kernel of it running.
            unsafe { (self.context.driver.functions.module_unload)(self.module) };
        });
    }
}

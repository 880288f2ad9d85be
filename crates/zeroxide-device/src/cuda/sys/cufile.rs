//! cuFile's functions, with their types: files that a device reads by itself (`GPUDirect` Storage).
#![expect(unsafe_code, reason = "calls into NVIDIA's cuFile")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;

use super::library::{Library, functions};
use crate::cuda::error::{CudaError, Result};

/// Whether reads may go through host memory where the device cannot read by itself.
const ALLOW_COMPATIBLE_MODE: c_int = 1;
/// A file that is given by its descriptor.
const DESCRIPTOR: c_int = 1;

/// What calls return: cuFile's code, 0 for success, and the driver's code where cuFile's says that it was the driver.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Status {
    code: c_int,
    driver: c_int,
}

/// A file as cuFile takes it. The number of a descriptor lies where another kind of file has a pointer.
#[repr(C)]
pub(super) struct Description {
    kind: c_int,
    descriptor: Descriptor,
    operations: *const c_void,
}

#[repr(C, align(8))]
struct Descriptor {
    number: c_int,
}

functions! {
    /// What is used of cuFile.
    Functions -> Status {
        set_flag = c"cuFileSetParameterBool" (c_int, bool);
        open = c"cuFileDriverOpen" ();
        close = c"cuFileDriverClose_v2" ();
        register = c"cuFileHandleRegister" (*mut *mut c_void, *const Description);
    }
}

/// `cuFileHandleDeregister(handle)`.
type Deregister = unsafe extern "C" fn(*mut c_void);

/// cuFile, begun. Dropping it ends it.
pub(crate) struct CuFile {
    functions: Functions,
    deregister: Deregister,
}

impl CuFile {
    /// Loads the library and begins it, such that reads go straight to a device or not at all.
    pub(crate) fn open(libraries: &[String]) -> Result<Self> {
        let mut reason = String::from("no name was given");
        let found = libraries.iter().find_map(|name| {
            Library::open(name)
                .inspect_err(|said| reason.clone_from(said))
                .ok()
        });
        let library = found.ok_or_else(|| CudaError::NoStorage {
            tried: libraries.join(", "),
            reason,
        })?;
        let functions = Functions::of(&library)?;
        let deregister = library.need(c"cuFileHandleDeregister")?;
        // SAFETY: a function of this name has this type in every cuFile, and the library is never unloaded.
        let deregister = unsafe { std::mem::transmute::<*mut c_void, Deregister>(deregister) };
        // SAFETY: the function takes two numbers, and may be called before the library is begun.
        let said = unsafe { (functions.set_flag)(ALLOW_COMPATIBLE_MODE, false) };
        check("cuFileSetParameterBool", said)?;
        // SAFETY: the function takes nothing.
        let said = unsafe { (functions.open)() };
        check("cuFileDriverOpen", said)?;
        Ok(Self {
            functions,
            deregister,
        })
    }

    /// Whether devices can read `file`, which is open for direct I/O.
    pub(crate) fn takes(&self, file: &File) -> Result<()> {
        let description = Description {
            kind: DESCRIPTOR,
            descriptor: Descriptor {
                number: file.as_raw_fd(),
            },
            operations: ptr::null(),
        };
        let mut handle = ptr::null_mut();
        // SAFETY: both point to what lives through the call, and the file stays open beyond the end of its handle.
        let said = unsafe { (self.functions.register)(&raw mut handle, &raw const description) };
        check("cuFileHandleRegister", said)?;
        // SAFETY: the handle is the one that was made above, and nothing else has it.
        unsafe { (self.deregister)(handle) };
        Ok(())
    }
}

impl Drop for CuFile {
    fn drop(&mut self) {
        // SAFETY: the library was begun, and no handle is left.
        let _ = unsafe { (self.functions.close)() };
    }
}

fn check(call: &'static str, said: Status) -> Result<()> {
    if said.code == 0 {
        return Ok(());
    }
    let (code, driver) = (said.code.unsigned_abs(), said.driver.unsigned_abs());
    let name = name_of(code);
    let reason = match driver {
        0 => name.to_owned(),
        _ => format!("{name}, and CUDA's driver {driver}"),
    };
    Err(CudaError::Storage { call, code, reason })
}

/// NVIDIA's name for a code that these calls may return.
fn name_of(code: u32) -> &'static str {
    match code {
        5001 => {
            "CU_FILE_DRIVER_NOT_INITIALIZED, nvidia-fs is not loaded and the kernel has no other way"
        }
        5002 => "CU_FILE_DRIVER_INVALID_PROPS",
        5003 => "CU_FILE_DRIVER_UNSUPPORTED_LIMIT",
        5004 => "CU_FILE_DRIVER_VERSION_MISMATCH, nvidia-fs is of another version",
        5005 => "CU_FILE_DRIVER_VERSION_READ_ERROR",
        5007 => "CU_FILE_PLATFORM_NOT_SUPPORTED",
        5008 => "CU_FILE_IO_NOT_SUPPORTED, the file system is not one that it knows",
        5009 => "CU_FILE_DEVICE_NOT_SUPPORTED",
        5010 => "CU_FILE_NVFS_DRIVER_ERROR",
        5011 => "CU_FILE_CUDA_DRIVER_ERROR",
        5018 => "CU_FILE_INVALID_FILE_TYPE",
        5019 => "CU_FILE_INVALID_FILE_OPEN_FLAG",
        5020 => "CU_FILE_DIO_NOT_SET",
        5022 => "CU_FILE_INVALID_VALUE",
        5025 => "CU_FILE_PERMISSION_DENIED",
        5027 => "CU_FILE_HANDLE_NOT_REGISTERED, it knows nothing of the disk or its file system",
        5029 => "CU_FILE_DEVICE_NOT_FOUND",
        5030 => "CU_FILE_INTERNAL_ERROR",
        5033 => "CU_FILE_NVFS_SETUP_ERROR",
        5034 => "CU_FILE_IO_DISABLED, its configuration says so",
        5048 => "CU_FILE_NVFS_INTERNAL_DRIVER_ERROR",
        _ => "a code of no name here",
    }
}

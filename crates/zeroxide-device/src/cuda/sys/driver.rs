//! The driver's functions, with their types.
//!
//! Every call that depends on a context is made while it is current on the thread: [`owned`](super::owned) sees to it.
#![expect(unsafe_code, reason = "calls into NVIDIA's driver")]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;

use super::library::{Library, functions};
use crate::cuda::error::{CudaError, Result, Version};

/// The oldest interface that has all functions below and that torch of this time is built for.
pub(crate) const OLDEST: Version = Version {
    major: 12,
    minor: 0,
};

/// Codes of the driver's that are told apart.
pub(crate) mod code {
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const INVALID_CONTEXT: i32 = 201;
    pub(crate) const ECC_UNCORRECTABLE: i32 = 214;
    pub(crate) const NOT_FOUND: i32 = 500;
    pub(crate) const INVALID_HANDLE: i32 = 400;
    pub(crate) const NOT_READY: i32 = 600;
    /// The device read or wrote where nothing is; what follows is of its kind and ends the context as well.
    pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
    pub(crate) const LAUNCH_TIMEOUT: i32 = 702;
    pub(crate) const CONTEXT_IS_DESTROYED: i32 = 709;
    pub(crate) const ASSERT: i32 = 710;
    pub(crate) const HARDWARE_STACK_ERROR: i32 = 714;
    pub(crate) const LAUNCH_FAILED: i32 = 719;
    pub(crate) const UNKNOWN: i32 = 999;
}

/// What the driver says of a device, by its numbers for it.
#[derive(Clone, Copy)]
pub(crate) enum DeviceAttribute {
    /// Dynamic shared memory that a block may have if it asks for it, in bytes.
    MaxSharedBytes = 97,
    Multiprocessors = 16,
    ArchitectureMajor = 75,
    ArchitectureMinor = 76,
}

/// What the driver says of a kernel.
#[derive(Clone, Copy)]
pub(crate) enum KernelAttribute {
    LocalBytes = 3,
    Registers = 4,
    MaxDynamicSharedBytes = 8,
}

functions! {
    /// NVIDIA's names are on the right: `_v2` is what its header makes of the plain name.
    Functions -> c_int {
        init = c"cuInit" (c_uint);
        driver_version = c"cuDriverGetVersion" (*mut c_int);
        error_name = c"cuGetErrorName" (c_int, *mut *const c_char);
        error_text = c"cuGetErrorString" (c_int, *mut *const c_char);
        device_count = c"cuDeviceGetCount" (*mut c_int);
        device = c"cuDeviceGet" (*mut c_int, c_int);
        device_name = c"cuDeviceGetName" (*mut c_char, c_int, c_int);
        device_attribute = c"cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
        context_retain = c"cuDevicePrimaryCtxRetain" (*mut usize, c_int);
        context_release = c"cuDevicePrimaryCtxRelease_v2" (c_int);
        context_push = c"cuCtxPushCurrent_v2" (usize);
        context_pop = c"cuCtxPopCurrent_v2" (*mut usize);
        context_wait = c"cuCtxSynchronize" ();
        memory_info = c"cuMemGetInfo_v2" (*mut usize, *mut usize);
        allocate = c"cuMemAlloc_v2" (*mut u64, usize);
        free = c"cuMemFree_v2" (u64);
        register = c"cuMemHostRegister_v2" (usize, usize, c_uint);
        unregister = c"cuMemHostUnregister" (usize);
        copy_up = c"cuMemcpyHtoDAsync_v2" (u64, usize, usize, usize);
        copy_down = c"cuMemcpyDtoHAsync_v2" (usize, u64, usize, usize);
        stream_create = c"cuStreamCreate" (*mut usize, c_uint);
        stream_destroy = c"cuStreamDestroy_v2" (usize);
        stream_wait = c"cuStreamSynchronize" (usize);
        stream_wait_event = c"cuStreamWaitEvent" (usize, usize, c_uint);
        event_create = c"cuEventCreate" (*mut usize, c_uint);
        event_destroy = c"cuEventDestroy_v2" (usize);
        event_record = c"cuEventRecord" (usize, usize);
        event_query = c"cuEventQuery" (usize);
        event_wait = c"cuEventSynchronize" (usize);
        module_load = c"cuModuleLoadData" (*mut usize, *const c_void);
        module_unload = c"cuModuleUnload" (usize);
        module_kernel = c"cuModuleGetFunction" (*mut usize, usize, *const c_char);
        kernel_attribute = c"cuFuncGetAttribute" (*mut c_int, c_int, usize);
        set_kernel_attribute = c"cuFuncSetAttribute" (usize, c_int, c_int);
        launch = c"cuLaunchKernel" (
            usize, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *mut *mut c_void, *mut *mut c_void,
        );
    }
}

/// `cuFuncGetParamInfo(kernel, index, offset, size)`, which drivers for CUDA 12.4 and later have.
type ParameterInfo = unsafe extern "C" fn(usize, usize, *mut usize, *mut usize) -> c_int;

/// NVIDIA's driver, begun.
#[derive(Clone)]
pub(crate) struct Driver {
    pub(super) functions: Functions,
    pub(super) parameter_info: Option<ParameterInfo>,
    library: String,
    version: Version,
}

impl Driver {
    /// Loads the driver and begins it.
    pub(crate) fn load(library: &str) -> Result<Self> {
        let opened = Library::open(library).map_err(|reason| CudaError::NoDriver {
            library: library.to_owned(),
            reason,
        })?;
        let functions = Functions::of(&opened)?;
        // SAFETY: a function of this name has this type in every driver that has it, and the driver is never unloaded.
        let parameter_info = opened
            .find(c"cuFuncGetParamInfo")
            .map(|found| unsafe { std::mem::transmute::<*mut c_void, ParameterInfo>(found) });
        let mut version: c_int = 0;
        // SAFETY: the function fills in one number, and may be called before the driver has begun.
        let status = unsafe { (functions.driver_version)(&raw mut version) };
        let version = u32::try_from(version).unwrap_or(0);
        let driver = Self {
            functions,
            parameter_info,
            library: opened.name().to_owned(),
            version: Version {
                major: version / 1000,
                minor: version % 1000 / 10,
            },
        };
        driver.check("cuDriverGetVersion", 0, status)?;
        if driver.version < OLDEST {
            return Err(CudaError::DriverTooOld {
                library: driver.library,
                found: driver.version,
                need: OLDEST,
            });
        }
        // SAFETY: no flags exist; a second call does nothing.
        let status = unsafe { (functions.init)(0) };
        if status != 0 {
            return Err(CudaError::NoDriver {
                library: driver.library.clone(),
                reason: format!("cuInit says {}", driver.reason(status)),
            });
        }
        Ok(driver)
    }

    /// The interface that the driver has.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The library that it was loaded from.
    pub(crate) fn library(&self) -> &str {
        &self.library
    }

    /// Devices that the driver shows.
    pub(crate) fn devices(&self) -> Result<u32> {
        let mut found = 0;
        // SAFETY: the function fills in one number.
        let status = unsafe { (self.functions.device_count)(&raw mut found) };
        self.check("cuDeviceGetCount", 0, status)?;
        Ok(u32::try_from(found).unwrap_or(0))
    }

    /// The driver's number for the device `number`.
    pub(super) fn device(&self, number: u32) -> Result<c_int> {
        let devices = self.devices()?;
        let missing = CudaError::NoDevice {
            device: number,
            devices,
        };
        if number >= devices {
            return Err(missing);
        }
        let mut found = 0;
        let asked = c_int::try_from(number).map_err(|_| missing)?;
        // SAFETY: the function fills in one number.
        let status = unsafe { (self.functions.device)(&raw mut found, asked) };
        self.check("cuDeviceGet", number, status)?;
        Ok(found)
    }

    /// What the maker calls the device.
    pub(super) fn name(&self, device: c_int) -> Result<String> {
        let mut text = [0_u8; 256];
        // SAFETY: the function writes at most as many bytes as it is told there are, the last of them zero.
        let status = unsafe { (self.functions.device_name)(text.as_mut_ptr().cast(), 256, device) };
        self.check("cuDeviceGetName", number(device), status)?;
        let text = CStr::from_bytes_until_nul(&text).unwrap_or(c"?");
        Ok(text.to_string_lossy().into_owned())
    }

    /// A number of the device's.
    pub(super) fn attribute(&self, device: c_int, which: DeviceAttribute) -> Result<u32> {
        let mut found = 0;
        // SAFETY: the function fills in one number.
        let status =
            unsafe { (self.functions.device_attribute)(&raw mut found, which as c_int, device) };
        self.check("cuDeviceGetAttribute", number(device), status)?;
        Ok(u32::try_from(found).unwrap_or(0))
    }

    /// Free bytes and all bytes of the device whose context is current; zeros where the driver does not say.
    pub(super) fn memory(&self) -> (u64, u64) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the function fills in two numbers.
        let status = unsafe { (self.functions.memory_info)(&raw mut free, &raw mut total) };
        if status == 0 {
            (free as u64, total as u64)
        } else {
            (0, 0)
        }
    }

    /// Loads machine code of `bytes` in the current context. Errors with the driver's code.
    pub(super) fn load_module(&self, image: &[u8]) -> std::result::Result<usize, c_int> {
        let mut module = 0;
        // SAFETY: the image is a whole file of machine code, which tells its own length in its header; the driver copies
        // what it needs. Whoever compiled it checked that it is one, see `Cubin`.
        let status =
            unsafe { (self.functions.module_load)(&raw mut module, image.as_ptr().cast()) };
        if status == 0 { Ok(module) } else { Err(status) }
    }

    /// The kernel `entry` of a module. Errors with the driver's code.
    pub(super) fn kernel(
        &self,
        module: usize,
        entry: &CString,
    ) -> std::result::Result<usize, c_int> {
        let mut kernel = 0;
        // SAFETY: the module is loaded, and the name ends with a zero byte.
        let status =
            unsafe { (self.functions.module_kernel)(&raw mut kernel, module, entry.as_ptr()) };
        if status == 0 { Ok(kernel) } else { Err(status) }
    }

    /// Bytes of the one argument of a kernel; `None` where the driver cannot tell, zero where there is not just one.
    pub(super) fn argument_bytes(&self, kernel: usize) -> Option<u64> {
        let info = self.parameter_info?;
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function fills in two numbers, and refuses an index that the kernel does not have.
        let first = unsafe { info(kernel, 0, &raw mut offset, &raw mut bytes) };
        // SAFETY: as above.
        let second = unsafe { info(kernel, 1, &raw mut offset, ptr::null_mut()) };
        Some(if first == 0 && second != 0 {
            bytes as u64
        } else {
            0
        })
    }

    /// What a code means, in the driver's words.
    pub(crate) fn reason(&self, status: c_int) -> String {
        let name = self.words(self.functions.error_name, status);
        let text = self.words(self.functions.error_text, status);
        match (name, text) {
            (Some(name), Some(text)) => format!("{name}: {text}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => format!("error {status}"),
        }
    }

    #[expect(clippy::unused_self, reason = "the function is one of this driver's")]
    fn words(
        &self,
        function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
        status: c_int,
    ) -> Option<String> {
        let mut text: *const c_char = ptr::null();
        // SAFETY: the function fills in where a text of the driver's is, or null for a code that it does not know.
        let found = unsafe { function(status, &raw mut text) };
        if found != 0 || text.is_null() {
            return None;
        }
        // SAFETY: the text ends with a zero byte and is there as long as the driver, which is never unloaded.
        let text = unsafe { CStr::from_ptr(text) };
        Some(text.to_string_lossy().into_owned())
    }

    /// Accepts success; anything else is an error of `call` on `device`.
    pub(super) fn check(&self, call: &'static str, device: u32, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let reason = self.reason(status);
        Err(match status {
            code::ECC_UNCORRECTABLE
            | code::ILLEGAL_ADDRESS
            | code::LAUNCH_TIMEOUT
            | code::CONTEXT_IS_DESTROYED..=code::ASSERT
            | code::HARDWARE_STACK_ERROR..=code::LAUNCH_FAILED
            | code::UNKNOWN => CudaError::Lost {
                call,
                device,
                reason,
            },
            _ => CudaError::Driver {
                call,
                device,
                code: status.unsigned_abs(),
                reason,
            },
        })
    }
}

/// A device's number as it is told.
pub(super) fn number(device: c_int) -> u32 {
    u32::try_from(device).unwrap_or(0)
}

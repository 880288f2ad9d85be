//! Whether there is a driver, a device's context, and its kernels.
//!
//! `unsafe` is at home here: launching a kernel, whose promise is the caller's.
#![expect(unsafe_code, reason = "passes on the promise of who launches a kernel")]

use std::sync::Arc;

use super::compile::Cubin;
use super::error::{CudaError, Result, Version};
use super::sys::driver::{DeviceAttribute, Driver, KernelAttribute};
use super::sys::kernel::{Grid, LoadedKernel, NotLoaded};
use super::sys::nvrtc::c_text;
use super::sys::owned::Primary;

/// What the driver's library is called where the loader looks.
pub const DRIVER: &str = "libcuda.so.1";

/// What a machine has of CUDA.
#[derive(Debug)]
pub enum Probe {
    /// A driver that does, and devices.
    Usable {
        /// The driver's interface.
        version: Version,
        /// Devices that it shows, at least one.
        devices: u32,
    },
    /// No such driver, or no device.
    Unusable(CudaError),
}

/// Looks for a driver and devices. That there are none is an answer.
pub fn probe(library: &str) -> Probe {
    let found = Driver::load(library).and_then(|driver| Ok((driver.version(), driver.devices()?)));
    match found {
        Ok((_, 0)) => Probe::Unusable(CudaError::NoDevice {
            device: 0,
            devices: 0,
        }),
        Ok((version, devices)) => Probe::Usable { version, devices },
        Err(error) => Probe::Unusable(error),
    }
}

/// A part in a device's primary context.
#[derive(Clone, Debug)]
pub struct Context {
    pub(super) primary: Arc<Primary>,
    name: String,
    architecture: u32,
    multiprocessors: u32,
    max_shared_bytes: u32,
}

impl Context {
    /// The context of device `number`, by the driver that is called `library`.
    pub fn open(library: &str, number: u32) -> Result<Self> {
        let primary = Primary::retain(Driver::load(library)?, number)?;
        let major = primary.attribute(DeviceAttribute::ArchitectureMajor)?;
        let minor = primary.attribute(DeviceAttribute::ArchitectureMinor)?;
        Ok(Self {
            name: primary.name()?,
            architecture: major * 10 + minor,
            multiprocessors: primary.attribute(DeviceAttribute::Multiprocessors)?,
            max_shared_bytes: primary.attribute(DeviceAttribute::MaxSharedBytes)?,
            primary: Arc::new(primary),
        })
    }

    /// The device's number, from 0.
    pub fn device(&self) -> u32 {
        self.primary.number()
    }

    /// What the maker calls the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability, as 90 for 9.0.
    pub fn architecture(&self) -> u32 {
        self.architecture
    }

    /// How many blocks really run at once, at least.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Dynamic shared memory that a block may have, in bytes.
    pub fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }

    /// The driver's interface.
    pub fn driver_version(&self) -> Version {
        self.primary.driver().version()
    }

    /// Free bytes of the device and all of them.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.primary.memory()
    }

    /// Loads the kernel `entry` of a compiled source.
    ///
    /// # Errors
    /// [`CudaError::Load`], [`CudaError::NoKernel`], [`CudaError::OutOfMemory`]; [`CudaError::DriverTooOld`] where the
    /// compiler is of a later generation than the driver.
    pub fn load(&self, source_name: &str, cubin: &Cubin, entry: &str) -> Result<Kernel> {
        let name = c_text("a kernel's name", entry)?;
        match LoadedKernel::new(Arc::clone(&self.primary), cubin.bytes(), &name)? {
            Ok(loaded) => Ok(Kernel { loaded }),
            Err(NotLoaded::Entry) => Err(CudaError::NoKernel {
                source_name: source_name.to_owned(),
                entry: entry.to_owned(),
            }),
            Err(NotLoaded::File(reason)) => Err(CudaError::Load {
                source_name: source_name.to_owned(),
                device: self.device(),
                architecture: self.architecture,
                reason,
            }),
        }
    }

    /// Refuses a compiler whose code the driver cannot take: one of a later major version.
    pub fn check_compiler(&self, compiler: Version) -> Result<()> {
        let driver = self.primary.driver();
        if compiler.major <= driver.version().major {
            return Ok(());
        }
        Err(CudaError::DriverTooOld {
            library: driver.library().to_owned(),
            found: driver.version(),
            need: Version {
                major: compiler.major,
                minor: 0,
            },
        })
    }
}

/// A kernel that is ready to run.
#[derive(Debug)]
pub struct Kernel {
    loaded: LoadedKernel,
}

/// What one thread of a kernel uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelUse {
    /// Registers.
    pub registers: u32,
    /// Bytes of memory for what has no register, spills among them.
    pub local_bytes: u32,
    /// Bytes of the kernel's one argument, where the driver tells.
    pub argument_bytes: Option<u64>,
}

impl Kernel {
    /// What one thread uses.
    pub fn usage(&self) -> Result<KernelUse> {
        Ok(KernelUse {
            registers: self.loaded.attribute(KernelAttribute::Registers)?,
            local_bytes: self.loaded.attribute(KernelAttribute::LocalBytes)?,
            argument_bytes: self.loaded.argument_bytes(),
        })
    }

    /// Starts the kernel on `stream`, a handle of the same device's (torch's are) or 0 for the default stream. Returns
    /// before it ends.
    ///
    /// # Errors
    /// [`CudaError::Arguments`] for an argument of another size than the kernel's, [`CudaError::Handle`] for a stream of
    /// another device, [`CudaError::Launch`] for a grid that the device does not take, [`CudaError::Lost`].
    ///
    /// # Safety
    /// `argument` is the kernel's struct; the memory that its pointers point to is there, as large as the kernel takes it
    /// for, until the kernel has ended, and nothing else that runs meanwhile writes what the kernel uses or reads what
    /// it writes. `stream` is a stream that is there.
    pub unsafe fn launch(&self, grid: Grid, stream: usize, argument: &[u8]) -> Result<()> {
        // SAFETY: the caller promises what is asked for.
        unsafe { self.loaded.launch(grid, stream, argument) }
    }
}

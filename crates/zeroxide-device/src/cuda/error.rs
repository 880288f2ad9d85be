//! What can go wrong between this process and an NVIDIA device.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A version of the driver's interface or of NVRTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes where old programs may stop working.
    pub major: u32,
    /// Changes where new things come.
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Failures of the driver, of the compiler and of what they are asked for.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver's library is not there.
    #[error(
        "no CUDA driver: {library} cannot be loaded ({reason}); install NVIDIA's driver or compute on the CPU"
    )]
    NoDriver {
        /// The library asked for.
        library: String,
        /// What the loader said.
        reason: String,
    },
    /// The driver speaks an older interface than is needed.
    #[error(
        "the CUDA driver {library} is too old: it is for CUDA {found}, needed is {need}; update NVIDIA's driver"
    )]
    DriverTooOld {
        /// The library.
        library: String,
        /// The interface that it has.
        found: Version,
        /// The oldest that does.
        need: Version,
    },
    /// A library lacks a function.
    #[error(
        "{library} has no function {entry}: it is too old or not what its name says; update it"
    )]
    NoEntry {
        /// The library.
        library: String,
        /// The function.
        entry: &'static str,
    },
    /// A device that the driver does not show.
    #[error(
        "no CUDA device {device}: the driver shows {devices}; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The number asked for, from 0.
        device: u32,
        /// Devices that there are.
        devices: u32,
    },
    /// NVRTC is nowhere.
    #[error(
        "NVRTC cannot be loaded from {tried} ({reason}); it comes with torch's CUDA wheels: pip install nvidia-cuda-nvrtc"
    )]
    NoCompiler {
        /// Where it was looked for.
        tried: String,
        /// What the loader said of the last one.
        reason: String,
    },
    /// The compiler does not know what the device is.
    #[error(
        "NVRTC {nvrtc} cannot compile for sm_{architecture}: it knows {known}; use a newer nvidia-cuda-nvrtc"
    )]
    UnknownArchitecture {
        /// The source file.
        source_name: String,
        /// The compute capability, as 90 for 9.0.
        architecture: u32,
        /// What the compiler knows.
        known: String,
        /// Its version.
        nvrtc: Version,
    },
    /// The source is wrong.
    #[error("NVRTC {nvrtc} refuses {source_name} for sm_{architecture}: {log}")]
    Compile {
        /// The source file.
        source_name: String,
        /// The compute capability, as 90 for 9.0.
        architecture: u32,
        /// The compiler's version.
        nvrtc: Version,
        /// All that the compiler said, its lines joined.
        log: String,
    },
    /// The compiler itself failed.
    #[error("NVRTC {nvrtc} failed in {call} for {source_name}: {reason}")]
    Compiler {
        /// The function.
        call: &'static str,
        /// The source file.
        source_name: String,
        /// The compiler's version.
        nvrtc: Version,
        /// What it said.
        reason: String,
    },
    /// Text for the compiler or the driver with a zero byte in it, which would end it there.
    #[error("{what} has a zero byte at {at}")]
    ZeroByte {
        /// What it is.
        what: String,
        /// Where the byte is.
        at: usize,
    },
    /// The device's memory is full.
    #[error(
        "out of device memory: {need} bytes for {what} do not fit, {free} of {total} bytes of device {device} are free; \
             use smaller batches or offload more"
    )]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        need: u64,
        /// Free bytes.
        free: u64,
        /// Bytes of the device.
        total: u64,
        /// The device.
        device: u32,
    },
    /// Host memory cannot be prepared for copies.
    #[error(
        "device {device} cannot register {bytes} bytes of host memory ({reason}); the process's limit of \
             locked memory is {limit}: raise it with ulimit -l or register less"
    )]
    Register {
        /// Bytes asked for.
        bytes: u64,
        /// The limit of locked memory, in words: "8388608 bytes", "unlimited".
        limit: String,
        /// The device.
        device: u32,
        /// What the driver said.
        reason: String,
    },
    /// A file for another device, or one that is damaged.
    #[error("device {device} (sm_{architecture}) cannot load {source_name}: {reason}")]
    Load {
        /// The source file.
        source_name: String,
        /// The device.
        device: u32,
        /// Its compute capability, as 90 for 9.0.
        architecture: u32,
        /// What the driver said.
        reason: String,
    },
    /// A function that the compiled source does not have.
    #[error("{source_name} has no kernel {entry}")]
    NoKernel {
        /// The source file.
        source_name: String,
        /// The kernel.
        entry: String,
    },
    /// An argument of another size.
    #[error("kernel {entry} takes one argument of {expected} bytes, got {got}")]
    Arguments {
        /// The kernel.
        entry: String,
        /// Bytes of the kernel's struct, 0 where it is not one struct.
        expected: u64,
        /// Bytes given.
        got: u64,
    },
    /// A launch that the driver refuses.
    #[error(
        "kernel {entry} of {blocks} blocks of {threads} threads with {shared_bytes} bytes of shared memory on stream \
             {stream:#x} of device {device} was refused: {reason}"
    )]
    Launch {
        /// The kernel.
        entry: String,
        /// Blocks of the grid.
        blocks: u64,
        /// Threads of a block.
        threads: u32,
        /// Dynamic shared memory of a block.
        shared_bytes: u32,
        /// The stream's handle.
        stream: u64,
        /// The device.
        device: u32,
        /// What the driver said.
        reason: String,
    },
    /// A handle that is not one of this device.
    #[error("{what} {handle:#x} is not one of device {device}: {reason}")]
    Handle {
        /// What it is a handle of.
        what: &'static str,
        /// The handle.
        handle: u64,
        /// The device.
        device: u32,
        /// What the driver said.
        reason: String,
    },
    /// The device computes no more in this process.
    #[error(
        "device {device} is lost to this process: {call} says {reason}; start again from the last checkpoint"
    )]
    Lost {
        /// The call that said so. What caused it may have come before.
        call: &'static str,
        /// The device.
        device: u32,
        /// What the driver said.
        reason: String,
    },
    /// Another refusal of the driver.
    #[error("{call} failed on device {device}: {reason}")]
    Driver {
        /// The call.
        call: &'static str,
        /// The device.
        device: u32,
        /// The driver's code.
        code: u32,
        /// What the driver said.
        reason: String,
    },
    /// A child of a process that has begun to use the device.
    #[error(
        "the CUDA context was made in process {created} and used in its forked child {current}; start processes by spawn"
    )]
    Forked {
        /// Process that made it.
        created: u32,
        /// The child.
        current: u32,
    },
    /// A compiled kernel that cannot be kept.
    #[error("cannot {action} {} in the kernel cache: {source}; set ZEROXIDE_CACHE_DIR to a directory that can be written", path.display())]
    Cache {
        /// What was being done.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// cuFile's library is nowhere.
    #[error(
        "cuFile cannot be loaded from {tried} ({reason}); it comes with torch's CUDA wheels: pip install nvidia-cufile"
    )]
    NoStorage {
        /// Where it was looked for.
        tried: String,
        /// What the loader said of the last one.
        reason: String,
    },
    /// A refusal of cuFile's.
    #[error("{call} says {code} ({reason})")]
    Storage {
        /// The call.
        call: &'static str,
        /// cuFile's code.
        code: u32,
        /// Its name in NVIDIA's headers, and what is known of it.
        reason: String,
    },
    /// A directory in which no file can be opened for direct I/O.
    #[error("no file in {} can be opened for direct I/O: {source}", path.display())]
    NotDirect {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Machine code that came with zeroxide and is not as it was made.
    #[error("{} is damaged: {reason}; install zeroxide again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl From<zeroxide_memory::Forked> for CudaError {
    fn from(forked: zeroxide_memory::Forked) -> Self {
        Self::Forked {
            created: forked.created,
            current: forked.current,
        }
    }
}

/// Short form of every result here.
pub(crate) type Result<T> = std::result::Result<T, CudaError>;

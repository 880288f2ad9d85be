//! Whether devices could read files by themselves (`GPUDirect` Storage): a look, and nothing is read.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::context::{Probe, probe};
use super::error::{CudaError, Result};
use super::sys::cufile::CuFile;

/// Looks whether a device can read files in `directory` without host memory in between.
///
/// driver: the name of the CUDA driver. libraries: where cuFile may be, in the order of trying. The library may log to a
/// file in the current directory and may take long; whoever cannot have that asks in a process of its own.
///
/// # Errors
/// What is missing first: the driver, a device, the library, what the kernel needs for it, a file system that it knows.
pub fn probe_storage(driver: &str, libraries: &[String], directory: &Path) -> Result<()> {
    if let Probe::Unusable(error) = probe(driver) {
        return Err(error);
    }
    let library = CuFile::open(libraries)?;
    let file = Trial::create(directory)?;
    library.takes(&file.file)
}

/// An empty file for direct I/O, which is removed when this is dropped.
struct Trial {
    file: File,
    path: PathBuf,
}

impl Trial {
    fn create(directory: &Path) -> Result<Self> {
        let path = directory.join(format!(".zeroxide-direct-{}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path);
        match file {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => {
                // Where a file system has no direct I/O, Linux may make the file and then refuse to open it.
                drop(fs::remove_file(&path));
                Err(CudaError::NotDirect {
                    path: directory.to_owned(),
                    source,
                })
            }
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

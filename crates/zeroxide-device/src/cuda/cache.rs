//! Machine code that was compiled before, in a directory that any number of processes use at once.
//!
//! A file (`kept.rs`) is named by a checksum of its key. One that is damaged, or of another key with the same checksum,
//! is compiled anew. A file is written under a name of its own and renamed, so that readers see a whole one or none.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::compile::{Compiler, Source};
use super::error::{CudaError, Result};
use super::kept::{Contents, Kept, key, sum};

/// A directory of machine code.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// A cache in `directory`, which is made when something is kept.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The machine code of a source, compiled where it is not there or damaged.
    ///
    /// # Errors
    /// Those of [`Compiler::compile`].
    pub fn compile(
        &self,
        compiler: &Compiler,
        source: &Source,
        architecture: u32,
        options: &[String],
    ) -> Result<Kept> {
        let version = compiler.version();
        let key = key(version, source, architecture, options);
        let path = self.directory.join(format!("{:016x}.cubin", sum(&key)));
        let found = fs::read(&path)
            .ok()
            .and_then(|bytes| Contents::of(&bytes))
            .filter(|contents| contents.key == key);
        if let Some(contents) = found {
            return Ok(Kept {
                contents,
                compiler: version,
                cached: true,
                problem: None,
            });
        }
        let fresh = compiler.compile(source, architecture, options)?;
        let contents = Contents {
            key,
            log: fresh.log,
            cubin: fresh.cubin,
        };
        let problem = self.keep(&path, &contents.file()).err();
        Ok(Kept {
            contents,
            compiler: version,
            cached: false,
            problem,
        })
    }

    fn keep(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CudaError::Cache {
                action,
                path,
                source,
            }
        };
        fs::create_dir_all(&self.directory).map_err(failed("create", &self.directory))?;
        let aside = self.directory.join(own_name());
        write(&aside, bytes)
            .map_err(failed("write", &aside))
            .and_then(|()| fs::rename(&aside, path).map_err(failed("rename to", path)))
            .inspect_err(|_| drop(fs::remove_file(&aside)))
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    File::create_new(path)?.write_all(bytes)
}

/// A name that no other process and no other call here uses, as long as processes of one number do not share the
/// directory from several machines; the time tells those apart.
fn own_name() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |time| time.as_nanos());
    format!(".{}-{call}-{now:x}.new", std::process::id())
}

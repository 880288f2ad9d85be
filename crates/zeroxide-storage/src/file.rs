//! An open file with its alignment rules: direct where the file system has it, buffered where not.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::StorageError;
use crate::private;
use crate::syscall;

/// Alignment in bytes of offset, length, and buffer address for operations on a direct file.
pub const DIRECT_ALIGN: usize = 4096;

/// How much is written at a time where the file system cannot preallocate.
const FILL_BYTES: usize = 1 << 20;

/// An open file of fixed size.
///
/// [`is_direct`](Self::is_direct) files bypass the page cache (`O_DIRECT`), so their transfers cost no
/// memory beyond the buffer; whether the file system has that is found out by reading once at opening.
/// Where it has not (some tmpfs and overlay mounts, network file systems), the file is buffered.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    direct: bool,
    bytes: u64,
}

impl DiskFile {
    /// Creates (or replaces) `path` with `bytes` bytes allocated on disk, so that a full disk is
    /// noticed here and not at a later write. The contents are unspecified until written, and only the
    /// owner may read them.
    ///
    /// # Errors
    ///
    /// [`StorageError::NoSpace`] with the bytes needed and free; the file is removed again.
    /// [`StorageError::ReadOnly`], [`StorageError::MissingParent`], or [`StorageError::File`] when
    /// the file cannot be created.
    pub fn create(path: impl Into<PathBuf>, bytes: u64) -> Result<Arc<Self>, StorageError> {
        let path = path.into();
        let plain =
            private::create_file(&path).map_err(|source| refusal("create", &path, source))?;
        allocate(&plain, &path, bytes).inspect_err(|_| {
            // The partly allocated file is of no use, and keeping it would keep the disk full.
            let _ = std::fs::remove_file(&path);
        })?;
        Ok(Arc::new(Self::prefer_direct(plain, path, bytes)))
    }

    /// Opens an existing file for reading and writing; its size is taken as it is now.
    ///
    /// # Errors
    ///
    /// [`StorageError::File`] or [`StorageError::ReadOnly`] when it cannot be opened.
    pub fn open(path: impl Into<PathBuf>) -> Result<Arc<Self>, StorageError> {
        let path = path.into();
        let plain = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| refusal("open", &path, source))?;
        let bytes = size_of_file(&plain, &path)?;
        Ok(Arc::new(Self::prefer_direct(plain, path, bytes)))
    }

    /// Opens a file for reading only; its size is taken as it is now. `direct` false keeps to the page cache, for
    /// transfers that are not aligned.
    ///
    /// # Errors
    ///
    /// [`StorageError::File`] when it cannot be opened.
    pub fn open_to_read(path: impl Into<PathBuf>, direct: bool) -> Result<Arc<Self>, StorageError> {
        let path = path.into();
        let plain = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|source| refusal("open", &path, source))?;
        let bytes = size_of_users(&plain, &path)?;
        let file = if direct {
            open_direct(&path, false)
        } else {
            None
        };
        Ok(Arc::new(Self::of(plain, file, path, bytes)))
    }

    /// Opens a file for writing and reading, made as the umask says if there is none, with at least `bytes` bytes
    /// allocated on disk; what it has is kept. `direct` as for [`open_to_read`](Self::open_to_read).
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); a file that was there stays.
    pub fn open_to_write(
        path: impl Into<PathBuf>,
        bytes: u64,
        direct: bool,
    ) -> Result<Arc<Self>, StorageError> {
        let path = path.into();
        let (plain, made) = open_or_make(&path).map_err(|source| refusal("open", &path, source))?;
        let before = size_of_users(&plain, &path)?;
        if before < bytes {
            reserve(&plain, &path, before, bytes, extend).inspect_err(|_| {
                if made {
                    let _ = std::fs::remove_file(&path);
                }
            })?;
        }
        let file = if direct {
            open_direct(&path, true)
        } else {
            None
        };
        Ok(Arc::new(Self::of(plain, file, path, before.max(bytes))))
    }

    /// The path the file was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers bypass the page cache and must be aligned to [`DIRECT_ALIGN`].
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Size of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes everything written so far survive a power cut.
    pub(crate) fn sync(&self) -> Result<(), StorageError> {
        self.file.sync_data().map_err(|source| StorageError::File {
            action: "sync",
            path: self.path.clone(),
            source,
        })
    }

    /// The open file, for the engines.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    fn prefer_direct(plain: File, path: PathBuf, bytes: u64) -> Self {
        let direct = open_direct(&path, true);
        Self::of(plain, direct, path, bytes)
    }

    fn of(plain: File, direct: Option<File>, path: PathBuf, bytes: u64) -> Self {
        Self {
            direct: direct.is_some(),
            file: direct.unwrap_or(plain),
            path,
            bytes,
        }
    }
}

/// The file at `path`, and whether it was made now.
fn open_or_make(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other.map(|file| (file, false)),
    }
    match options.create_new(true).open(path) {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok((options.create_new(false).open(path)?, false))
        }
        other => other.map(|file| (file, true)),
    }
}

/// The size of a file of the user's, which has to be one: a pipe would be waited for.
fn size_of_users(file: &File, path: &Path) -> Result<u64, StorageError> {
    let bytes = size_of_file(file, path)?;
    match file.metadata() {
        Ok(found) if found.is_file() => Ok(bytes),
        _ => Err(StorageError::File {
            action: "open",
            path: path.to_path_buf(),
            source: io::Error::other("it is no regular file"),
        }),
    }
}

fn size_of_file(file: &File, path: &Path) -> Result<u64, StorageError> {
    match file.metadata() {
        Ok(found) => Ok(found.len()),
        Err(source) => Err(StorageError::File {
            action: "stat",
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// Opens `path` with `O_DIRECT` and reads once. Some file systems accept the flag and refuse the
/// transfer, some kernels accept both on tmpfs: only a real read tells.
fn open_direct(path: &Path, write: bool) -> Option<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .ok()?;
    let mut memory = vec![0_u8; 2 * DIRECT_ALIGN];
    let start = memory.as_ptr().align_offset(DIRECT_ALIGN);
    let page = memory.get_mut(start..start + DIRECT_ALIGN)?;
    loop {
        match file.read_at(page, 0) {
            Ok(_) => return Some(file),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

fn allocate(file: &File, path: &Path, bytes: u64) -> Result<(), StorageError> {
    reserve(file, path, 0, bytes, fill)
}

/// Gives a file of `before` bytes disk space for `bytes`; `otherwise` where the file system cannot.
fn reserve(
    file: &File,
    path: &Path,
    before: u64,
    bytes: u64,
    otherwise: fn(&File, u64) -> io::Result<()>,
) -> Result<(), StorageError> {
    // Asked first, so that a hopeless request does not fill the disk for other processes on its way
    // to failing.
    let free = syscall::free_bytes(path).unwrap_or(u64::MAX);
    if bytes - before > free {
        return Err(StorageError::NoSpace {
            path: path.to_path_buf(),
            need: bytes - before,
            free,
        });
    }
    if bytes == 0 {
        return Ok(());
    }
    let outcome = match syscall::fallocate(file, bytes) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
            otherwise(file, bytes)
        }
        other => other,
    };
    outcome.map_err(|source| {
        if is_out_of_space(&source) {
            let free = syscall::free_bytes(path).unwrap_or(0);
            StorageError::NoSpace {
                path: path.to_path_buf(),
                need: bytes - before,
                free,
            }
        } else {
            StorageError::File {
                action: "preallocate",
                path: path.to_path_buf(),
                source,
            }
        }
    })
}

/// Makes a file longer that others may write to as well: none of what they have written is touched.
fn extend(file: &File, bytes: u64) -> io::Result<()> {
    file.lock()?;
    let outcome = match file.metadata() {
        Ok(found) if found.len() < bytes => file.set_len(bytes),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    file.unlock()?;
    outcome
}

/// Writes zeros over the whole file: the preallocation of file systems that have no other.
fn fill(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0_u8; FILL_BYTES];
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(FILL_BYTES as u64);
        // The length is at most FILL_BYTES, a usize.
        let piece = &zeros[..usize::try_from(length).unwrap_or(FILL_BYTES)];
        file.write_all_at(piece, offset)?;
        offset += length;
    }
    Ok(())
}

/// Whether the operating system ran out of blocks or of quota.
pub(crate) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Names the reason why `path` could not be created or opened.
pub(crate) fn refusal(action: &'static str, path: &Path, source: io::Error) -> StorageError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StorageError::ReadOnly { path, source }
        }
        io::ErrorKind::NotADirectory => StorageError::NotADirectory { path },
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free = path
                .parent()
                .and_then(|parent| syscall::free_bytes(parent).ok());
            StorageError::NoSpace {
                path,
                need: 1,
                free: free.unwrap_or(0),
            }
        }
        io::ErrorKind::NotFound => match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() && !parent.exists() => {
                let missing = parent.to_path_buf();
                StorageError::MissingParent { path, missing }
            }
            _ => StorageError::File {
                action,
                path,
                source,
            },
        },
        _ => StorageError::File {
            action,
            path,
            source,
        },
    }
}

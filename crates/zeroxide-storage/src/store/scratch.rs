//! One scratch directory: `<directory>/<job>/` with `LOCK`, `header`, and `blocks.bin`, for its owner alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header::{HEADER, HEADER_NEXT};
use super::lock::{DirectoryLock, LOCK};
use super::manifest::MANIFEST_NEXT;
use crate::error::StorageError;
use crate::file::{DiskFile, refusal};
use crate::private;

/// Name of the data file in its directory.
const BLOCKS: &str = "blocks.bin";

/// How often to start over when the directory is removed by a run that is just ending.
const ATTEMPTS: usize = 100;

/// A scratch directory that this process has locked.
#[derive(Debug)]
pub(super) struct Scratch {
    /// `<directory>/<job>`.
    path: PathBuf,
    /// `<directory>`, when it was made for this store.
    made_root: Option<PathBuf>,
    /// The process id of a run that left this directory behind.
    taken_over: Option<u32>,
    /// Released after everything else is gone: fields drop after `remove`.
    _lock: DirectoryLock,
}

impl Scratch {
    /// Makes `<root>/<job>` and locks it; takes over what a dead run left there.
    ///
    /// `ephemeral`: it is to be removed at the end. What dead runs should have removed from `root` goes first: a rank that
    /// was killed leaves as many bytes as its state has.
    pub(super) fn open(root: &Path, job: &str, ephemeral: bool) -> Result<Self, StorageError> {
        let made_root = make_root(root)?.then(|| root.to_path_buf());
        let path = root.join(job);
        if ephemeral {
            sweep(root, &path);
        }
        match lock(&path, ephemeral) {
            Ok((lock, previous)) => Ok(Self {
                path,
                made_root,
                taken_over: previous,
                _lock: lock,
            }),
            Err(error) => {
                if let Some(root) = made_root {
                    // Not empty when another run came first, and then it is that run's.
                    let _ = fs::remove_dir(root);
                }
                Err(error)
            }
        }
    }

    /// Preallocates the data file, replacing what a dead run left.
    pub(super) fn allocate(&self, bytes: u64) -> Result<Arc<DiskFile>, StorageError> {
        DiskFile::create(self.path.join(BLOCKS), bytes)
    }

    /// Opens the data file of `bytes` bytes that an earlier run has left.
    pub(super) fn reopen(&self, bytes: u64) -> Result<Arc<DiskFile>, StorageError> {
        let gone = |reason: String| StorageError::DataGone {
            path: self.path.clone(),
            reason,
        };
        let file = match DiskFile::open(self.path.join(BLOCKS)) {
            Err(StorageError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(gone(format!("there is no {BLOCKS}")));
            }
            other => other?,
        };
        if file.bytes() == bytes {
            return Ok(file);
        }
        let found = file.bytes();
        Err(gone(format!("{BLOCKS} has {found} bytes, not {bytes}")))
    }

    /// Where the directory is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// One line about a dead run whose directory this was.
    pub(super) fn note(&self) -> Option<String> {
        self.taken_over.map(|pid| {
            let path = self.path.display();
            format!("took over {path}, left by run pid {pid}; its data was discarded")
        })
    }

    /// Removes the directory and what this store put there, and nothing else.
    pub(super) fn remove(&self) -> Result<(), StorageError> {
        // The lock file goes last: a directory with contents but without it is never taken over.
        for name in [BLOCKS, HEADER, HEADER_NEXT, MANIFEST_NEXT, LOCK] {
            let path = self.path.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::File {
                        action: "remove",
                        path,
                        source,
                    });
                }
                _ => {}
            }
        }
        remove_empty(&self.path)?;
        self.made_root.as_deref().map_or(Ok(()), remove_empty)
    }
}

/// Removes what dead runs were to remove from `root`, but for the directory that this run takes over by its name. What
/// cannot be removed stays: it is not this run's to complain of.
fn sweep(root: &Path, own: &Path) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    let paths = entries.flatten().map(|entry| entry.path());
    for path in paths.filter(|path| path != own) {
        if let Some(lock) = DirectoryLock::inherit(&path) {
            let left = Scratch {
                path,
                made_root: None,
                taken_over: None,
                _lock: lock,
            };
            let _ = left.remove();
        }
    }
}

/// Removes a directory unless someone has put something there meanwhile.
fn remove_empty(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        Err(source) => Err(StorageError::File {
            action: "remove",
            path: path.into(),
            source,
        }),
    }
}

/// Makes sure that `root` is a directory; returns whether it was made here.
fn make_root(root: &Path) -> Result<bool, StorageError> {
    match fs::metadata(root) {
        Ok(metadata) if metadata.is_dir() => Ok(false),
        Ok(_) => Err(StorageError::NotADirectory {
            path: root.to_path_buf(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match private::create_directory(root) {
                Ok(()) => Ok(true),
                // Another rank's store was first.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && root.is_dir() => {
                    Ok(false)
                }
                Err(source) => Err(refusal("create", root, source)),
            }
        }
        Err(source) => Err(refusal("open", root, source)),
    }
}

/// Makes the scratch directory itself and locks it.
fn lock(path: &Path, ephemeral: bool) -> Result<(DirectoryLock, Option<u32>), StorageError> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        match private::create_directory(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                check_ours(path)?;
                match private::close_directory(path) {
                    // Removed meanwhile, by the run that was ending: the lock below finds that out.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(refusal("close to other users", path, error));
                    }
                    _ => {}
                }
            }
            Err(source) => return Err(refusal("create", path, source)),
        }
        match DirectoryLock::acquire(path, ephemeral) {
            // The only way not to find a directory that was there a moment ago: a run that was ending
            // has removed it.
            Err(StorageError::MissingParent { .. }) if attempt < ATTEMPTS => {}
            Err(StorageError::File { source, .. })
                if source.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {}
            other => return other,
        }
    }
}

/// Refuses an existing path that is not a scratch directory, so that nothing of the user's is touched.
fn check_ours(path: &Path) -> Result<(), StorageError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(refusal("list", path, source)),
    };
    let mut others = false;
    for entry in entries.flatten() {
        if entry.file_name() == LOCK {
            return Ok(());
        }
        others = true;
    }
    // A run that is ending may have removed its lock file since the listing began.
    if others && path.exists() && fs::read_dir(path).is_ok_and(|mut left| left.next().is_some()) {
        return Err(StorageError::Foreign {
            path: path.to_path_buf(),
        });
    }
    Ok(())
}

//! What was done to a disk, in order: from it a test makes what a power cut at any point may leave.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// One act on a file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JournalEntry {
    /// Bytes of a file were written in place.
    Write {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A file was made, or replaced, with these contents.
    Create {
        /// The file.
        path: PathBuf,
        /// What is in it.
        bytes: Vec<u8>,
    },
    /// A file's contents were synced.
    Sync {
        /// The file.
        path: PathBuf,
    },
    /// A file was renamed, and replaced what had that name.
    Rename {
        /// Its name before.
        from: PathBuf,
        /// Its name from then on.
        to: PathBuf,
    },
    /// A file was removed.
    Remove {
        /// The file.
        path: PathBuf,
    },
    /// The names in a directory were synced.
    SyncDirectory {
        /// The directory.
        path: PathBuf,
    },
}

/// A list of what was done to a disk. Clones are the same list.
#[derive(Clone, Default)]
pub struct Journal(Arc<Mutex<Vec<JournalEntry>>>);

impl Journal {
    /// Adds an act that is about to be done.
    pub fn note(&self, entry: JournalEntry) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(entry);
    }

    /// All acts so far.
    pub fn entries(&self) -> Vec<JournalEntry> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PartialEq for Journal {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Journal of {} acts", self.len())
    }
}

//! Small files that are replaced as a whole: whoever reads one, after whatever end of this process or of the machine, sees
//! what was there before or all of what is there now.
//!
//! The order is: write aside, sync the file, rename, sync the directory. A disk that drops or reorders what was not synced
//! can then lose the replacement as a whole, never a part of it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::error::StorageError;
use crate::file::refusal;
use crate::private;
use crate::queue::{Journal, JournalEntry};

/// Makes `bytes` the contents of `<directory>/<name>`, written first as `<directory>/<aside>`. Survives a power cut when it
/// returns. `journal` is told of each act, before it is done.
pub(super) fn publish(
    directory: &Path,
    name: &str,
    aside: &str,
    bytes: &[u8],
    journal: Option<&Journal>,
) -> Result<(), StorageError> {
    let (path, next) = (directory.join(name), directory.join(aside));
    let note = |entry: JournalEntry| {
        if let Some(journal) = journal {
            journal.note(entry);
        }
    };
    note(JournalEntry::Create {
        path: next.clone(),
        bytes: bytes.to_vec(),
    });
    let write = |mut file: File| -> io::Result<()> {
        file.write_all(bytes)?;
        note(JournalEntry::Sync { path: next.clone() });
        file.sync_all()
    };
    private::create_file(&next)
        .and_then(write)
        .map_err(|source| refusal("write", &next, source))?;
    note(JournalEntry::Rename {
        from: next.clone(),
        to: path.clone(),
    });
    fs::rename(&next, &path).map_err(|source| refusal("rename", &path, source))?;
    sync_directory(directory, journal)
}

/// Removes `<directory>/<name>` if it is there. A power cut may bring it back.
pub(super) fn withdraw(
    directory: &Path,
    name: &str,
    journal: Option<&Journal>,
) -> Result<(), StorageError> {
    let path = directory.join(name);
    if let Some(journal) = journal {
        journal.note(JournalEntry::Remove { path: path.clone() });
    }
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StorageError::File {
            action: "remove",
            path,
            source,
        }),
        _ => Ok(()),
    }
}

/// Makes names in `directory` survive a power cut.
pub(super) fn sync_directory(
    directory: &Path,
    journal: Option<&Journal>,
) -> Result<(), StorageError> {
    if let Some(journal) = journal {
        journal.note(JournalEntry::SyncDirectory {
            path: directory.to_path_buf(),
        });
    }
    match File::open(directory).and_then(|file| file.sync_all()) {
        // Some file systems have no such thing: there, names are as safe as they ever are.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other.map_err(|source| refusal("sync", directory, source)),
    }
}

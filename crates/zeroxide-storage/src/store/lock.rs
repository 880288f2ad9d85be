//! The lock of a scratch directory: a file that its run keeps locked for as long as it lives.
//!
//! The kernel releases the lock when the run ends, however it ends, so a lock file that can be locked
//! belongs to nobody. Its text only serves the message: process id, start time, and process namespace.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Holder, StorageError};
use crate::file::refusal;
use crate::process::Origin;

/// Name of the lock file in its directory.
pub(super) const LOCK: &str = "LOCK";

/// How often to start over when the lock file is removed by a run that is just ending.
const ATTEMPTS: usize = 100;

/// A held lock; released when dropped.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    file: File,
    origin: Origin,
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Forked children share the lock and keep it when the file is merely closed here; unlocking
        // releases it for all of them, which is why a child must not do it.
        if self.origin.is_here() {
            let _ = self.file.unlock();
        }
    }
}

/// Identifies a process for as long as the machine is up.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// Clock ticks after boot; tells a process from a later one with the same id.
    start: u64,
    /// The namespace in which `pid` means something.
    namespace: String,
}

impl DirectoryLock {
    /// Locks the scratch directory `directory`, which must exist. Also returns the process id of the
    /// run that held the lock and ended without removing its directory, if there was one.
    pub(super) fn acquire(directory: &Path) -> Result<(Self, Option<u32>), StorageError> {
        let path = directory.join(LOCK);
        for _ in 0..ATTEMPTS {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(|source| refusal("create", &path, source))?;
            match take(file, &path)? {
                Taken::Stale => {}
                Taken::Held(holder) => {
                    return Err(StorageError::InUse {
                        path: directory.to_path_buf(),
                        holder,
                    });
                }
                Taken::Ours(mut lock) => {
                    let previous = Process::read(&mut lock.file).map(|process| process.pid);
                    Process::current()
                        .write(&mut lock.file)
                        .map_err(|source| refusal("write", &path, source))?;
                    return Ok((lock, previous));
                }
            }
        }
        Err(StorageError::InUse {
            path: directory.to_path_buf(),
            holder: Holder::Unknown,
        })
    }
}

/// What came of trying to lock an open lock file.
enum Taken {
    /// It is locked.
    Ours(DirectoryLock),
    /// Someone else holds it.
    Held(Holder),
    /// It was locked, but is no longer the file at its path, so the lock means nothing: the run that
    /// held it was ending, and removes its lock file while holding it.
    Stale,
}

/// Tries to lock `file`, which was opened at `path`.
fn take(mut file: File, path: &Path) -> Result<Taken, StorageError> {
    match file.try_lock() {
        Ok(()) if is_at(&file, path) => Ok(Taken::Ours(DirectoryLock {
            file,
            origin: Origin::here(),
        })),
        Ok(()) => Ok(Taken::Stale),
        Err(TryLockError::WouldBlock) => Ok(Taken::Held(holder(&mut file))),
        Err(TryLockError::Error(source)) => Err(StorageError::File {
            action: "lock",
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.dev() == named.dev() && open.ino() == named.ino(),
        _ => false,
    }
}

/// Who holds the lock, by the text of its file.
fn holder(file: &mut File) -> Holder {
    match Process::read(file) {
        None => Holder::Unknown,
        Some(process) if process.is_gone() => Holder::Orphan { pid: process.pid },
        Some(process) => Holder::Run { pid: process.pid },
    }
}

impl Process {
    fn current() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            start: start_time(pid).unwrap_or(0),
            namespace: namespace(),
        }
    }

    /// Whether the process has certainly ended; not known of processes in other namespaces.
    fn is_gone(&self) -> bool {
        self.namespace == namespace() && start_time(self.pid) != Some(self.start)
    }

    fn read(file: &mut File) -> Option<Self> {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).ok()?;
        file.read_to_string(&mut text).ok()?;
        let mut words = text.split_whitespace();
        Some(Self {
            pid: words.next()?.parse().ok()?,
            start: words.next()?.parse().ok()?,
            namespace: words.next()?.into(),
        })
    }

    fn write(&self, file: &mut File) -> std::io::Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        writeln!(file, "{} {} {}", self.pid, self.start, self.namespace)
    }
}

/// Field 22 of `/proc/PID/stat` (proc(5)): when the process started, in clock ticks after boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2, the command, is in parentheses and may itself contain spaces and parentheses.
    let (_, after_command) = stat.rsplit_once(')')?;
    after_command.split_whitespace().nth(19)?.parse().ok()
}

fn namespace() -> String {
    fs::read_link("/proc/self/ns/pid").map_or_else(
        |_| "unknown".into(),
        |link| link.to_string_lossy().into_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_that_was_removed_or_replaced_is_not_a_lock() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join(LOCK);
        let open = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).expect("writable")
        };
        let (removed, replaced) = (open(), open());
        fs::remove_file(&path).expect("it exists");
        assert!(matches!(take(removed, &path), Ok(Taken::Stale)));
        let current = open();
        assert!(matches!(take(replaced, &path), Ok(Taken::Stale)));
        let held = take(current, &path);
        assert!(matches!(held, Ok(Taken::Ours(_))));
        assert!(matches!(
            take(open(), &path),
            Ok(Taken::Held(Holder::Unknown))
        ));
    }
}

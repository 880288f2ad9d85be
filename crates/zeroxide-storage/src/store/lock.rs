//! The lock of a scratch directory: a file that its run keeps locked for as long as it lives.
//!
//! The kernel releases the lock when the run ends, however it ends, so a lock file that can be locked
//! belongs to nobody. Its text serves the message: process id, start time, and where that process lives. It also says
//! whether the directory was to be removed at the end of its run, so that a later run may do that for a dead one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use zeroxide_memory::ForkGuard;

use crate::error::{Holder, StorageError};
use crate::file::refusal;
use crate::private;

/// Name of the lock file in its directory.
pub(super) const LOCK: &str = "LOCK";

/// Last word in the lock file of a directory that is to be removed.
const SCRATCH: &str = "scratch";

/// How often to start over when the lock file is removed by a run that is just ending.
const ATTEMPTS: usize = 100;

/// A held lock; released when dropped.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    file: File,
    guard: ForkGuard,
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // Forked children share the lock and keep it when the file is merely closed here; unlocking
        // releases it for all of them, which is why a child must not do it.
        if !self.guard.is_forked() {
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
    /// The boot and namespace in which `pid` means something.
    namespace: String,
    /// What its run keeps here is of no use to any other.
    scratch: bool,
}

impl DirectoryLock {
    /// Locks the scratch directory `directory`, which must exist. Also returns the process id of the
    /// run that held the lock and ended without removing its directory, if there was one.
    ///
    /// `scratch`: whether the directory is to be removed at the end of this run.
    pub(super) fn acquire(
        directory: &Path,
        scratch: bool,
    ) -> Result<(Self, Option<u32>), StorageError> {
        let path = directory.join(LOCK);
        for _ in 0..ATTEMPTS {
            let file = private::open_or_create_file(&path)
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
                    Process::current(scratch)
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

    /// Locks `directory` if a run of this boot has left it that was to remove it, and is certainly gone.
    ///
    /// The lock alone would not do: over a network a file system may grant it twice, and a run that has just begun has
    /// not locked its directory yet.
    pub(super) fn inherit(directory: &Path) -> Option<Self> {
        let path = directory.join(LOCK);
        let mut file = OpenOptions::new().read(true).write(true).open(&path).ok()?;
        if !Process::read(&mut file)?.has_left_scratch() {
            return None;
        }
        match take(file, &path) {
            // Another run may have taken it over before it was locked here.
            Ok(Taken::Ours(mut lock)) => Process::read(&mut lock.file)
                .is_some_and(|process| process.has_left_scratch())
                .then_some(lock),
            _ => None,
        }
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
            guard: ForkGuard::new(),
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
    fn current(scratch: bool) -> Self {
        let pid = std::process::id();
        Self {
            pid,
            start: start_time(pid).unwrap_or(0),
            namespace: namespace(),
            scratch,
        }
    }

    fn has_left_scratch(&self) -> bool {
        self.scratch && self.is_gone()
    }

    /// Whether the process has certainly ended; not known of processes in other namespaces.
    fn is_gone(&self) -> bool {
        self.namespace != "unknown"
            && self.namespace == namespace()
            && start_time(self.pid) != Some(self.start)
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
            scratch: words.next() == Some(SCRATCH),
        })
    }

    fn write(&self, file: &mut File) -> std::io::Result<()> {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        let kind = if self.scratch { SCRATCH } else { "kept" };
        writeln!(
            file,
            "{} {} {} {kind}",
            self.pid, self.start, self.namespace
        )
    }
}

/// Field 22 of `/proc/PID/stat` (proc(5)): when the process started, in clock ticks after boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2, the command, is in parentheses and may itself contain spaces and parentheses.
    let (_, after_command) = stat.rsplit_once(')')?;
    after_command.split_whitespace().nth(19)?.parse().ok()
}

/// Namespaces have the same names on every host and after every boot.
fn namespace() -> String {
    let link = fs::read_link("/proc/self/ns/pid");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    match (link, boot) {
        (Ok(link), Ok(boot)) => format!("{}@{}", link.to_string_lossy(), boot.trim()),
        _ => "unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches: a directory taken from a live run, from one on another host or boot, or from one that wants to keep it.
    #[test]
    fn only_scratch_of_a_run_that_is_certainly_gone_is_inherited() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join(LOCK);
        let own = Process::current(true);
        let dead = Process {
            start: own.start + 1,
            ..own.clone()
        };
        let says = |process: &Process| {
            let mut file = File::create(&path).expect("writable");
            process.write(&mut file).expect("writable");
            DirectoryLock::inherit(directory.path())
        };
        assert!(
            DirectoryLock::inherit(directory.path()).is_none(),
            "no lock file"
        );
        assert!(says(&own).is_none(), "alive");
        let kept = Process {
            scratch: false,
            ..dead.clone()
        };
        assert!(says(&kept).is_none(), "to be kept");
        let elsewhere = Process {
            namespace: "pid:[1]@another-boot".into(),
            ..dead.clone()
        };
        assert!(says(&elsewhere).is_none(), "elsewhere");
        let lock = says(&dead).expect("dead, and was to be removed");
        assert!(DirectoryLock::inherit(directory.path()).is_none(), "held");
        drop(lock);
        fs::write(&path, "").expect("writable");
        assert!(
            DirectoryLock::inherit(directory.path()).is_none(),
            "a run that is just beginning"
        );
    }

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

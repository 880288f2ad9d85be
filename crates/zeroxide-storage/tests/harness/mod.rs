//! What the tests of this crate share: memory, patterns, running operations, forking, mounting.

#![allow(dead_code, reason = "every test binary uses a part of this")]
#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

pub(crate) mod committing;
pub(crate) mod engines;
pub(crate) mod platter;
pub(crate) mod stores;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_storage::{Completion, DiskFile, OpKind, Operation, Queue, StorageError};

/// How long any single completion may take before the test counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// An arena of its own for one test.
pub(crate) fn arena(bytes: usize) -> Arena {
    Arena::new(&Budget::new(None), Bucket::Staging, bytes).unwrap()
}

/// A page-aligned lease.
pub(crate) fn lease(arena: &Arena, bytes: usize) -> Lease {
    arena.lease(bytes, 4096).unwrap()
}

/// Fills a buffer with bytes that differ with the seed and with the position.
pub(crate) fn fill(buffer: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// The bytes that [`fill`] makes.
pub(crate) fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    fill(&mut buffer, seed);
    buffer
}

/// One end of a queue, with its own reply channel.
pub(crate) struct Client<'a> {
    pub(crate) queue: &'a dyn Queue,
    pub(crate) reply: Sender<Completion>,
    pub(crate) completions: Receiver<Completion>,
}

impl<'a> Client<'a> {
    pub(crate) fn new(queue: &'a dyn Queue) -> Self {
        let (reply, completions) = channel();
        Self {
            queue,
            reply,
            completions,
        }
    }

    pub(crate) fn operation(
        &self,
        kind: OpKind,
        file: &Arc<DiskFile>,
        offset: u64,
        buffer: Lease,
        tag: u64,
    ) -> Operation {
        let (file, reply) = (Arc::clone(file), self.reply.clone().into());
        Operation {
            kind,
            file,
            offset,
            buffer,
            tag,
            unit: None,
            reply,
        }
    }

    pub(crate) fn start(
        &self,
        kind: OpKind,
        file: &Arc<DiskFile>,
        offset: u64,
        buffer: Lease,
        tag: u64,
    ) {
        let operation = self.operation(kind, file, offset, buffer, tag);
        self.queue
            .submit(operation)
            .map_err(|(error, _)| error)
            .unwrap();
    }

    pub(crate) fn next(&self) -> Completion {
        self.completions
            .recv_timeout(PATIENCE)
            .expect("an operation was never answered")
    }

    /// Runs one operation to its end.
    pub(crate) fn run(
        &self,
        kind: OpKind,
        file: &Arc<DiskFile>,
        offset: u64,
        buffer: Lease,
    ) -> (Lease, Result<(), StorageError>) {
        self.start(kind, file, offset, buffer, 0);
        let Completion { buffer, result, .. } = self.next();
        (buffer, result)
    }
}

/// Runs `child` in a forked process and returns its exit code, or `None` if it was still running after
/// [`PATIENCE`] (it is then killed). Whatever the child's threads would have done is lost.
pub(crate) fn in_fork(child: impl FnOnce() -> i32) -> Option<i32> {
    let pid = fork(child);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let mut status = 0;
        // SAFETY: `status` is writable for the whole call.
        let done = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        if done == pid {
            return libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(pid);
    None
}

/// Forks; the child runs `child` and exits without unwinding into the test runner, or is killed when the
/// test ends.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> libc::pid_t {
    fork_to_outlive(|| {
        // SAFETY: takes integers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        child()
    })
}

/// Forks a child that lives on when its parent ends.
pub(crate) fn fork_to_outlive(child: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child runs only the closure, on its own copy of this thread, and then exits.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: ends the child at once; takes no pointers.
        unsafe { libc::_exit(outcome.unwrap_or(101)) }
    }
    pid
}

/// Kills a child and waits for its end.
pub(crate) fn kill(pid: libc::pid_t) {
    // SAFETY: takes no pointers; `pid` is a child that has not been waited for.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    // SAFETY: a null status is allowed.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
}

/// Runs `test` on a thread with a mount namespace of its own, in which a file system of type `kind` is
/// mounted on a fresh directory. Returns `false`, having said why, where mounting is not permitted.
pub(crate) fn with_mount(kind: &str, data: &str, test: impl FnOnce(&Path) + Send) -> bool {
    let at = tempfile::tempdir().unwrap();
    let cstr = |text: &str| std::ffi::CString::new(text).unwrap();
    let (target, kind, data) = (cstr(at.path().to_str().unwrap()), cstr(kind), cstr(data));
    let root = cstr("/");
    std::thread::scope(|scope| {
        let body = || {
            // SAFETY: gives this thread its own view of the mounts; takes no pointers.
            let unshared = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
            if unshared != 0 {
                let error = std::io::Error::last_os_error();
                eprintln!("skipped: a private mount namespace is not permitted ({error})");
                return false;
            }
            let private = libc::MS_REC | libc::MS_PRIVATE;
            // SAFETY: all strings are NUL-terminated and outlive the call; null means "not given".
            let isolated = unsafe {
                libc::mount(
                    std::ptr::null(),
                    root.as_ptr(),
                    std::ptr::null(),
                    private,
                    std::ptr::null(),
                )
            };
            // SAFETY: as above.
            let mounted = unsafe {
                libc::mount(
                    kind.as_ptr(),
                    target.as_ptr(),
                    kind.as_ptr(),
                    0,
                    data.as_ptr().cast(),
                )
            };
            if isolated != 0 || mounted != 0 {
                let error = std::io::Error::last_os_error();
                eprintln!("skipped: mounting {kind:?} is not permitted ({error})");
                return false;
            }
            test(at.path());
            true
        };
        scope.spawn(body).join().unwrap()
    })
}

/// Makes the mount at `path` read-only. Only inside [`with_mount`].
pub(crate) fn remount_read_only(path: &Path) {
    let target = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
    // SAFETY: the path is NUL-terminated and outlives the call; null means "not given".
    let status = unsafe {
        libc::mount(
            std::ptr::null(),
            target.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    };
    assert_eq!(status, 0, "remount: {}", std::io::Error::last_os_error());
}

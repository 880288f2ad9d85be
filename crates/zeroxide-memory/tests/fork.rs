//! A forked child gets errors, and a stray read of an empty window a fault.
//!
//! The children below allocate nothing and take no lock: the test harness has other threads.

use zeroxide_layout::PAGE;
use zeroxide_memory::{Arena, Bucket, Budget, FRAME, ForkGuard, FramePool, MemoryError, Window};

/// How a forked child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}

/// Runs `child` in a forked process; its result is the exit code.
fn in_child(child: impl FnOnce() -> i32) -> End {
    // SAFETY: the child runs `child`, which keeps to what is allowed after fork in a process with
    // threads (see the module's note), and leaves without running any destructor of the parent's.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: restores the default action, so that a fault ends the child and nothing else runs.
        unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
        let code = child();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(code) };
    }
    assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: waits for the child made above and writes to a local.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Exit(libc::WEXITSTATUS(status))
    }
}

fn read(address: *const u8) -> u8 {
    // SAFETY: every caller passes an address of a live window; where there is no memory under it the
    // read faults, which is what is being shown.
    unsafe { address.read_volatile() }
}

fn forked<T>(result: Result<T, MemoryError>, parent: u32) -> bool {
    match result {
        Err(MemoryError::Forked { created, current }) => created == parent && current != parent,
        // Whatever else it is must not be dropped in the child: it may take a lock.
        other => {
            let _kept = std::mem::ManuallyDrop::new(other);
            false
        }
    }
}

#[test]
fn a_forked_child_gets_an_error_from_everything() {
    let parent = std::process::id();
    let budget = Budget::new(None);
    let arena = Arena::new(&budget, Bucket::Staging, PAGE).unwrap();
    let lease = arena.lease(10, 1).unwrap();
    let pool = FramePool::new(&budget, Bucket::Gathered, 2).unwrap();
    let frames = pool.take(1).unwrap();
    let mut mapped = Window::reserve(FRAME).unwrap();
    mapped.map(pool.take(1).unwrap()).unwrap();
    let mut empty = Window::reserve(FRAME).unwrap();
    let guard = ForkGuard::new();
    guard.check_process().unwrap();

    let end = in_child(|| {
        let refused = [
            forked(guard.check_process().map_err(MemoryError::from), parent),
            forked(pool.check_process(), parent),
            forked(arena.lease(1, 1), parent),
            forked(arena.free(), parent),
            forked(mapped.lease(0..1), parent),
            forked(mapped.unmap(), parent),
            forked(mapped.state(), parent),
            forked(empty.map(frames), parent),
            forked(empty.make_home(&budget, Bucket::Weights), parent),
            pool.take(0).is_none(),
            pool.free() == 0,
            !mapped.is_mapped(),
        ];
        let code = refused
            .iter()
            .position(|&ok| !ok)
            .map_or(0, |at| i32::try_from(at).unwrap_or(99) + 1);
        drop(lease);
        code
    });
    assert_eq!(
        end,
        End::Exit(0),
        "the number is that of the check that failed, from 1"
    );
}

#[test]
fn dropping_in_a_forked_child_unmaps_nothing() {
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, 1).unwrap();
    let mut window = Window::reserve(FRAME).unwrap();
    window.map(pool.take(1).unwrap()).unwrap();
    window.lease(0..1).unwrap().fill(6);
    let base = window.base();
    let end = in_child(move || {
        drop(window);
        drop(pool);
        i32::from(read(base))
    });
    // The closure was moved into the child's copy of this frame; the parent's window is dropped here.
    assert_eq!(end, End::Exit(6));
}

#[test]
fn a_stray_read_faults_unless_mapped() {
    let pool = FramePool::new(&Budget::new(None), Bucket::Gathered, 1).unwrap();
    let mut window = Window::reserve(FRAME).unwrap();
    let fault = End::Signal(libc::SIGSEGV);
    let stray = |window: &Window, offset| {
        let address = window.base().wrapping_add(offset);
        in_child(move || i32::from(read(address)))
    };
    assert_eq!(stray(&window, 0), fault, "never mapped");
    for round in 0..2 {
        window.map(pool.take(1).unwrap()).unwrap();
        window.lease(0..FRAME).unwrap().fill(7);
        assert_eq!(stray(&window, FRAME - 1), End::Exit(7), "round {round}");
        drop(window.unmap().unwrap());
        for offset in [0, FRAME / 2, FRAME - 1] {
            assert_eq!(
                stray(&window, offset),
                fault,
                "round {round}, offset {offset}"
            );
        }
    }
}

#[test]
fn memory_of_its_own_ends_at_the_windows_length() {
    let budget = Budget::new(None);
    let mut window = Window::reserve(2 * PAGE).unwrap();
    window.make_home(&budget, Bucket::Weights).unwrap();
    let last = window.base().wrapping_add(2 * PAGE - 1);
    assert_eq!(in_child(|| i32::from(read(last))), End::Exit(0));
    assert_eq!(
        in_child(|| i32::from(read(last.wrapping_add(1)))),
        End::Signal(libc::SIGSEGV)
    );
}

//! What follows when `io_uring` is not to be had.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use harness::{Client, arena, lease};
use zeroxide_storage::{
    DiskFile, EngineKind, OpKind, QueueOptions, StorageError, open_queue, open_queue_with,
};

/// Makes `io_uring_setup` fail with `errno` for this thread and those it starts, as the default
/// policies of container engines do.
fn refuse_io_uring(errno: u32) {
    let statement = |code, k| libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    };
    let jump = |k| libc::sock_filter {
        code: 0x15,
        jt: 0,
        jf: 1,
        k,
    };
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let mut filter = [
        statement(0x20, 0),                   // load the system call's number
        jump(number),                         // equal to io_uring_setup?
        statement(0x06, 0x0005_0000 | errno), // yes: SECCOMP_RET_ERRNO
        statement(0x06, 0x7fff_0000),         // no: SECCOMP_RET_ALLOW
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: takes integers only.
    let status = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(status, 0);
    // SAFETY: the program points to four valid instructions and both outlive the call.
    let status = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

fn on_a_thread_without_io_uring(errno: i32, test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                refuse_io_uring(u32::try_from(errno).unwrap());
                test();
            })
            .join()
            .unwrap();
    });
}

#[test]
fn asked_for_by_name_the_refusal_says_who_forbids_it() {
    for (errno, hint) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "no io_uring")] {
        on_a_thread_without_io_uring(errno, || {
            let error = open_queue(EngineKind::IoUring, 8)
                .err()
                .expect("refused by the filter");
            assert!(
                matches!(error, StorageError::IoUringRefused { .. }),
                "{error}"
            );
            assert!(error.to_string().contains(hint), "{error}");
        });
    }
}

#[test]
fn auto_goes_on_with_threads_and_says_why() {
    on_a_thread_without_io_uring(libc::EPERM, || {
        let queue = open_queue(EngineKind::Auto, 8).unwrap();
        let description = queue.describe();
        assert!(
            description.starts_with("threads") && description.contains("seccomp"),
            "{description}"
        );
        let directory = tempfile::tempdir().unwrap();
        let file = DiskFile::create(directory.path().join("data"), 4096).unwrap();
        let arena = arena(4096);
        let client = Client::new(&*queue);
        client
            .run(OpKind::Write, &file, 0, lease(&arena, 4096))
            .1
            .unwrap();
    });
}

#[test]
fn a_user_may_refuse_it_too() {
    let options = QueueOptions {
        refuse_io_uring: Some("by configuration".into()),
        ..Default::default()
    };
    let queue = open_queue_with(EngineKind::Auto, 8, &options).unwrap();
    assert!(
        queue.describe().contains("by configuration"),
        "{}",
        queue.describe()
    );
    let error = open_queue_with(EngineKind::IoUring, 8, &options)
        .err()
        .expect("refused");
    assert!(
        matches!(error, StorageError::IoUringRefused { .. }),
        "{error}"
    );
}

#[test]
fn auto_takes_io_uring_where_it_is_allowed() {
    if open_queue(EngineKind::IoUring, 1).is_ok() {
        let description = open_queue(EngineKind::Auto, 8).unwrap().describe();
        assert!(
            description.starts_with("io_uring, depth 8"),
            "{description}"
        );
    }
}

#[test]
fn depths_and_worker_counts_out_of_range_are_refused() {
    for kind in [EngineKind::Auto, EngineKind::Threads] {
        for depth in [0, 4097, usize::MAX] {
            let error = open_queue(kind.clone(), depth).err().expect("refused");
            assert!(
                matches!(error, StorageError::Depth { max: 4096, .. }),
                "{error}"
            );
        }
    }
    let options = QueueOptions {
        workers: 0,
        ..Default::default()
    };
    let error = open_queue_with(EngineKind::Threads, 1, &options)
        .err()
        .expect("refused");
    assert!(
        matches!(error, StorageError::Depth { depth: 0, .. }),
        "{error}"
    );
}

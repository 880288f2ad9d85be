//! Freed memory stays in the process, whichever thread frees it.

use zeroxide_memory::keep_freed_memory;

fn main() {
    if !has_settings() {
        assert!(!keep_freed_memory(None));
        return;
    }
    // Heaps of threads that have ended serve later ones, so each case has a process of its own.
    match std::env::args().nth(1).as_deref() {
        Some("main") => {
            assert!(keep_freed_memory(None));
            for mebibytes in [1, 32, 96] {
                check("main thread", mebibytes);
            }
            in_a_thread(|| check("heap of its own", 32));
        }
        Some("thread") => in_a_thread(|| {
            assert!(keep_freed_memory(None));
            in_a_thread(|| check("shared heap", 96));
        }),
        Some("budget") => {
            assert!(keep_freed_memory(Some(256 << 20)));
            in_a_thread(|| check("shared heap under a budget", 96));
        }
        _ => ["main", "thread", "budget"]
            .into_iter()
            .for_each(in_a_process),
    }
}

fn in_a_process(case: &str) {
    let program = std::env::current_exe().expect("this test is a program");
    let status = std::process::Command::new(program).arg(case).status();
    assert!(status.expect("the program starts").success(), "{case}");
}

fn in_a_thread(work: impl FnOnce() + Send) {
    let ended = std::thread::scope(|scope| scope.spawn(work).join());
    ended.expect("the thread only allocates");
}

fn check(what: &str, mebibytes: usize) {
    let (first, second) = (faults(mebibytes), faults(mebibytes));
    assert!(
        second < 32,
        "{what}, {mebibytes} MiB: {first} faults, then {second}"
    );
}

/// Page faults of this thread while it allocates, writes and frees a block.
fn faults(mebibytes: usize) -> i64 {
    let before = minor_faults();
    let mut block: Vec<u8> = Vec::with_capacity(mebibytes << 20);
    block.resize(mebibytes << 20, 1);
    assert!(
        std::hint::black_box(&block)
            .iter()
            .step_by(4096)
            .all(|&byte| byte == 1)
    );
    drop(block);
    minor_faults() - before
}

fn minor_faults() -> i64 {
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a local.
    let status = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(status, 0);
    usage.ru_minflt
}

/// Whether the process uses glibc's allocator: another library has no such call, and a sanitizer's
/// allocator refuses every parameter.
fn has_settings() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt accepts any pair of integers; this one only says when threads begin to share.
        let accepted = unsafe { libc::mallopt(libc::M_ARENA_TEST, 8) };
        accepted == 1
    }
    #[cfg(not(target_env = "gnu"))]
    {
        false
    }
}

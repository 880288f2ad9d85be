//! Freed memory stays in the process, whichever thread frees it.

use zeroxide_memory::keep_freed_memory;

fn main() {
    let sets = has_settings();
    assert_eq!(keep_freed_memory(None), sets);
    if !sets {
        return;
    }
    for mebibytes in [1, 32, 96] {
        let (first, second) = (faults(mebibytes), faults(mebibytes));
        assert!(
            second < 32,
            "main thread, {mebibytes} MiB: {first} faults, then {second}"
        );
        let (third, fourth) = std::thread::spawn(move || (faults(mebibytes), faults(mebibytes)))
            .join()
            .expect("the thread only allocates");
        assert!(
            fourth < 32,
            "other thread, {mebibytes} MiB: {third} faults, then {fourth}"
        );
    }
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

//! What the kernel counts, and memory given back to it.

use zeroxide_memory::{drop_clean_text, keep_freed_memory, resident_bytes};

#[test]
fn resident_memory_is_consistent() {
    let resident = resident_bytes().unwrap();
    assert!(resident.anon > 0 && resident.file > 0);
    // The kernel sums its counters per field, so the two sides may differ by pages counted late.
    let sum = resident.anon + resident.file;
    assert!(sum.abs_diff(resident.rss) <= 4 << 20, "{resident:?}");
    assert!(resident.peak >= resident.rss, "{resident:?}");
}

#[test]
fn clean_text_is_dropped_and_comes_back() {
    let dropped = drop_clean_text().unwrap();
    assert!(dropped > 0 && dropped.is_multiple_of(4096), "{dropped}");
    // Still running: the pages of this very function came back from the page cache.
    assert!(resident_bytes().unwrap().rss > 0);
    drop_clean_text().unwrap();
}

#[test]
fn the_allocator_keeps_what_is_freed() {
    if !keep_freed_memory() {
        assert!(!cfg!(target_env = "gnu"));
        return;
    }
    // Two rounds of the same request: without the setting each one is a new mapping, faulted in anew.
    let faults = |round: u8| {
        let before = minor_faults();
        let block = vec![round + 1; 64 << 20];
        assert!(block.iter().step_by(4096).all(|&byte| byte == round + 1));
        drop(block);
        minor_faults() - before
    };
    let (first, second) = (faults(0), faults(1));
    assert!(second * 4 < first, "{first} faults, then {second}");
}

/// Page faults of this thread that needed no disk.
fn minor_faults() -> i64 {
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes to a local.
    assert_eq!(
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) },
        0
    );
    usage.ru_minflt
}

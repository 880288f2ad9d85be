//! What the kernel counts, and memory given back to it.

use zeroxide_memory::{drop_clean_text, resident_bytes};

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
    let before = resident_bytes().unwrap().file;
    let dropped = drop_clean_text().unwrap();
    let after = resident_bytes().unwrap().file;
    assert!(dropped > 0 && dropped.is_multiple_of(4096), "{dropped}");
    // Not all of it: what runs between the two readings has come back, in groups of pages.
    assert!(
        after + dropped / 4 < before,
        "{before} bytes, {dropped} dropped, {after} left"
    );
}

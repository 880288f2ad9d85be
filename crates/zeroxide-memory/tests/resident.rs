//! What the kernel counts, and memory given back to it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use zeroxide_layout::PAGE;
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

/// A private, executable mapping of this program's file that nothing runs from.
struct Text {
    start: *mut libc::c_void,
    len: usize,
}

impl Text {
    fn map() -> Self {
        let file = File::open("/proc/self/exe").expect("the program's own file");
        let len = 64 * PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start, len }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped by `map` until the end of the process; the file is not written to.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len) }
    }

    /// Pages that are present, from the kernel's page map.
    fn present(&self) -> usize {
        let mut entries = vec![0; self.len / PAGE * 8];
        let at = (self.start.addr() / PAGE * 8) as u64;
        let file = File::open("/proc/self/pagemap").expect("the kernel's page map");
        file.read_exact_at(&mut entries, at)
            .expect("an entry for each page");
        // Bit 63 of each little-endian entry: page present.
        entries
            .chunks_exact(8)
            .filter(|entry| entry[7] & 0x80 != 0)
            .count()
    }
}

#[test]
fn clean_text_is_dropped_and_comes_back() {
    let text = Text::map();
    let bytes = text.bytes().to_vec();
    assert_eq!(text.present(), 64);
    let dropped = drop_clean_text().unwrap();
    assert_eq!(text.present(), 0);
    assert!(
        dropped >= text.len as u64 && dropped.is_multiple_of(PAGE as u64),
        "{dropped}"
    );
    assert_eq!(text.bytes(), bytes);
    assert_eq!(text.present(), 64);
}

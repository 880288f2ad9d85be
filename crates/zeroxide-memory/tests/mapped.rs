//! Pages of files leave the resident set, and nothing else changes.
#![expect(unsafe_code, reason = "maps files")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use zeroxide_layout::PAGE;
use zeroxide_memory::drop_pages_of_files;

const PAGES: usize = 5000;

/// A writable mapping of a file of `PAGES` pages, each of which is full of its own number.
fn mapped(flags: libc::c_int) -> &'static mut [u8] {
    let name = format!(
        "zeroxide-mapped-{}-{flags}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let path = std::env::temp_dir().join(name);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .expect("a file");
    std::fs::remove_file(path).expect("its name is not needed");
    for page in 0..PAGES {
        let byte = u8::try_from(page % 251).expect("below 251");
        file.write_all(&vec![byte; PAGE]).expect("room on the disk");
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGES * PAGE,
            protection,
            flags,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    // SAFETY: mapped until the end of the process, and nobody else has it or the file, which has no name.
    unsafe { std::slice::from_raw_parts_mut(start.cast(), PAGES * PAGE) }
}

/// Reads every page, so that it is resident.
fn touched(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().step_by(PAGE).copied().collect()
}

/// Pages that are present, from the kernel's page map.
fn present(bytes: &[u8]) -> usize {
    let mut entries = vec![0; bytes.len() / PAGE * 8];
    let at = (bytes.as_ptr().addr() / PAGE * 8) as u64;
    let file = File::open("/proc/self/pagemap").expect("the kernel's page map");
    file.read_exact_at(&mut entries, at)
        .expect("an entry for each page");
    entries
        .chunks_exact(8)
        .filter(|entry| entry[7] & 0x80 != 0)
        .count()
}

#[test]
fn pages_of_a_file_leave_and_come_back() {
    for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let bytes = mapped(flags);
        let before = touched(bytes);
        assert_eq!(present(bytes), PAGES);
        let dropped = drop_pages_of_files(bytes).unwrap();
        assert_eq!(dropped, (PAGES * PAGE) as u64);
        assert_eq!(present(bytes), 0);
        assert_eq!(touched(bytes), before);
    }
}

#[test]
fn what_was_written_stays() {
    for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let bytes = mapped(flags);
        touched(bytes);
        for page in [0, 1, 700, PAGES - 1] {
            bytes[page * PAGE + 17] = 255;
        }
        let expected = bytes.to_vec();
        drop_pages_of_files(bytes).unwrap();
        assert!(bytes == expected, "a byte has changed");
    }
}

#[test]
fn pages_that_are_somebody_elses_in_part_stay() {
    let bytes = mapped(libc::MAP_PRIVATE);
    touched(bytes);
    let dropped = drop_pages_of_files(&mut bytes[PAGE - 1..=4 * PAGE]).unwrap();
    assert_eq!(dropped, (3 * PAGE) as u64);
    assert_eq!(present(&bytes[..PAGE]), 1);
    assert_eq!(present(&bytes[4 * PAGE..5 * PAGE]), 1);
    for few in [0..0, 5..6, 10..PAGE] {
        assert_eq!(drop_pages_of_files(&mut bytes[few]).unwrap(), 0);
    }
}

#[test]
fn memory_of_the_heap_stays() {
    let mut heap = vec![7_u8; 64 * PAGE];
    assert_eq!(drop_pages_of_files(&mut heap).unwrap(), 0);
    assert!(heap.iter().all(|byte| *byte == 7));
}

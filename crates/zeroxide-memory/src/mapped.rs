//! Memory that the kernel can read from a file again: weights that a library has mapped, after they were copied.
#![expect(unsafe_code, reason = "drops pages of file mappings")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zeroxide_layout::PAGE;

use crate::map::drop_file_pages;

/// Pages whose entries are read at a time.
const AT_ONCE: usize = 4096;
/// Bits of an entry of the page map, see pagemap in the kernel's admin guide.
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;

/// Takes the pages of `bytes` that are nothing but a file's, or shared memory's, out of the resident set; they come
/// back when they are read. Every byte stays what it is: a page that was written to has left the file, and stays, as
/// do pages that `bytes` has only a part of. Returns the bytes dropped.
///
/// The borrow is exclusive, so that nobody writes into a page between the look at it and its drop.
///
/// # Errors
/// When the kernel's page map cannot be read, or refuses to drop a page.
pub fn drop_pages_of_files(bytes: &mut [u8]) -> io::Result<u64> {
    let begin = bytes.as_ptr().addr().next_multiple_of(PAGE);
    let end = (bytes.as_ptr().addr() + bytes.len()) / PAGE * PAGE;
    let map = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0_u8; AT_ONCE * size_of::<u64>()];
    let mut dropped = 0;
    let mut at = begin;
    while at < end {
        let pages = ((end - at) / PAGE).min(AT_ONCE);
        let read = &mut entries[..pages * size_of::<u64>()];
        map.read_exact_at(read, (at / PAGE * size_of::<u64>()) as u64)?;
        for (start, count) in runs(read) {
            // SAFETY: `runs` returns pages that the kernel calls a file's: unmodified ones of a private mapping, or
            // those of a shared one, which keep what is in them. They are inside `bytes`, which nobody else can write
            // to during the borrow.
            unsafe { drop_file_pages(at + start * PAGE, count * PAGE) }?;
            dropped += (count * PAGE) as u64;
        }
        at += pages * PAGE;
    }
    Ok(dropped)
}

/// (first, count) of pages in a row that are present and a file's, in entries of the page map.
fn runs(entries: &[u8]) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for (page, entry) in entries.as_chunks::<8>().0.iter().enumerate() {
        let entry = u64::from_ne_bytes(*entry);
        if entry & PRESENT == 0 || entry & OF_A_FILE == 0 {
            continue;
        }
        match found.last_mut() {
            Some((start, count)) if *start + *count == page => *count += 1,
            _ => found.push((page, 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{OF_A_FILE, PRESENT, runs};

    #[test]
    fn runs_are_of_pages_that_are_there_and_a_files() {
        let (both, absent, own) = (PRESENT | OF_A_FILE, OF_A_FILE, PRESENT);
        let entries: Vec<u8> = [both, both, own, both, absent, absent, both | 7]
            .into_iter()
            .flat_map(u64::to_ne_bytes)
            .collect();
        assert_eq!(runs(&entries), [(0, 2), (3, 1), (6, 1)]);
        assert_eq!(runs(&[]), []);
    }
}

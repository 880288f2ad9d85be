//! The kernel refuses to move pages: nothing is lost, no address is given away.
//!
//! One test alone in its process, since it lowers a limit of the whole process.
#![expect(clippy::unwrap_used, reason = "test helpers")]

use std::ops::Range;

use zeroxide_memory::{Bucket, Budget, FRAME, FramePool, MemoryError, Window};

/// Lets the process have no more than `bytes` of writable memory of its own, and returns the limit that
/// was. (To the kernel, a limit of 0 is none.)
fn limit_data(bytes: libc::rlim_t) -> libc::rlim_t {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes to a local.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_DATA, &raw mut limit) };
    assert_eq!(status, 0);
    let before = limit.rlim_cur;
    limit.rlim_cur = bytes;
    // SAFETY: reads a local; the limit is only a number to the kernel.
    let status = unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) };
    assert_eq!(status, 0);
    before
}

/// The kernel's mappings of this process, by ascending address.
fn mappings() -> Vec<Range<usize>> {
    let parse = |text| usize::from_str_radix(text, 16).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .map(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            parse(start)..parse(end)
        })
        .collect()
}

/// Whether the kernel has a mapping at every page of the range.
fn reserved(range: &Range<usize>) -> bool {
    let mut end = range.start;
    for mapping in mappings() {
        if mapping.contains(&end) {
            end = mapping.end;
        }
    }
    end >= range.end
}

/// Whether a sanitizer's allocator serves the process: it ends the process when the limit refuses it
/// memory of its own. It also refuses every parameter of glibc's.
fn sanitized() -> bool {
    // SAFETY: mallopt accepts any pair of integers; this one only says when threads begin to share.
    let accepted = unsafe { libc::mallopt(libc::M_ARENA_TEST, 8) };
    accepted == 0
}

#[test]
fn a_refused_move_loses_no_address_and_no_frame() {
    if sanitized() {
        return;
    }
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, 3).unwrap();
    let mut window = Window::reserve(2 * FRAME).unwrap();
    let len = window.len();
    let addresses = window.base().addr()..window.base().addr() + len;
    let of_pool =
        |range: &Range<usize>| range.len() == 3 * FRAME && range.start.is_multiple_of(FRAME);
    let homes = mappings().into_iter().find(of_pool).unwrap();

    let frames = pool.take(2).unwrap();
    let before = limit_data(4096);
    let refused = window.map(frames);
    limit_data(before);
    assert!(
        matches!(refused, Err(MemoryError::Os { .. })),
        "{refused:?}"
    );
    assert!(reserved(&addresses) && reserved(&homes));
    assert!(!window.is_mapped());
    assert_eq!(pool.free(), 3);

    // The same window and frames work once the limit is gone.
    window.map(pool.take(2).unwrap()).unwrap();
    window.lease(0..len).unwrap().fill(1);

    let before = limit_data(4096);
    let refused = window.unmap();
    limit_data(before);
    assert!(
        matches!(refused, Err(MemoryError::Os { .. })),
        "{refused:?}"
    );
    assert!(window.is_mapped() && reserved(&addresses) && reserved(&homes));
    assert_eq!(pool.free(), 1);
    drop(window.unmap().unwrap());
    assert_eq!(pool.free(), 3);
    let mut whole = Window::reserve(3 * FRAME).unwrap();
    whole.map(pool.take(3).unwrap()).unwrap();
    whole.lease(0..3 * FRAME).unwrap().fill(2);

    // Dropped while no page can move home: the frames' homes are unusable, so they are not handed out.
    let before = limit_data(4096);
    drop(whole);
    limit_data(before);
    assert!(reserved(&homes));
    assert_eq!(pool.free(), 0);
    assert_eq!(budget.total().current, 3 * FRAME as u64);
}

//! Rounding up.

/// Bytes of one page: the granule of direct I/O, of memory protection and of every block.
pub const PAGE: usize = 4096;

/// Bytes of a frame, the piece in which memory for gathered units is given out: one huge page, so that moving a frame
/// moves one page-table entry where the kernel has huge pages to give.
pub const FRAME: usize = 2 << 20;

/// The smallest multiple of `align` that is not below `n`.
///
/// # Panics
/// When `align` is zero or the result exceeds `u64::MAX`. Sizes that come from a model or a user go
/// through [`checked_align_up`].
pub const fn align_up(n: u64, align: u64) -> u64 {
    match checked_align_up(n, align) {
        Some(rounded) => rounded,
        None => panic!("align_up: alignment is zero or the result exceeds 64 bits"),
    }
}

/// [`align_up`], or `None` when `align` is zero or the result exceeds `u64::MAX`.
pub const fn checked_align_up(n: u64, align: u64) -> Option<u64> {
    n.checked_next_multiple_of(align)
}

/// [`checked_align_up`] for lengths in memory.
pub const fn checked_align_up_usize(n: usize, align: usize) -> Option<usize> {
    n.checked_next_multiple_of(align)
}

//! The C library's allocator, which torch's CPU tensors come from.
#![expect(unsafe_code, reason = "calls into the C library")]

/// Tells glibc to keep freed memory in the process, and to serve large requests from the heap instead of
/// from mappings of their own, so that activations of one step reuse the pages of the last one instead
/// of faulting them in again. Returns whether it applied: false with another C library.
///
/// Requests of all threads are served from one heap: those of 64 MiB and more do not fit the heaps glibc
/// makes per thread, and would be mapped and unmapped each time. Threads that already have a heap of
/// their own keep it, so call this early.
///
/// The settings hold for the whole process and cannot be taken back.
pub fn keep_freed_memory() -> bool {
    #[cfg(target_env = "gnu")]
    {
        let settings = [
            // No request is served by a mapping of its own, which would be unmapped when freed.
            (libc::M_MMAP_MAX, 0),
            // -1, the highest threshold: the top of the heap is never returned.
            (libc::M_TRIM_THRESHOLD, -1),
            (libc::M_ARENA_MAX, 1),
        ];
        settings.into_iter().all(|(parameter, value)| {
            // SAFETY: mallopt takes the allocator's own lock and accepts any pair of integers.
            let applied = unsafe { libc::mallopt(parameter, value) };
            applied == 1
        })
    }
    #[cfg(not(target_env = "gnu"))]
    {
        false
    }
}

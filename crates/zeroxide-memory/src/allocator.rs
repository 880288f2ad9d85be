//! The C library's allocator, which torch's CPU tensors come from.
#![expect(unsafe_code, reason = "calls into the C library")]

/// glibc's own default of `M_MMAP_MAX`.
#[cfg(target_env = "gnu")]
const MAX_MAPPINGS: i32 = 65536;
/// The highest `M_MMAP_THRESHOLD` that glibc takes.
#[cfg(target_env = "gnu")]
const DEFAULT_LARGEST: i32 = 32 << 20;

/// Bytes of memory that the allocator has taken from the system for its heaps, in use or free; 0 with another C library.
/// Blocks with mappings of their own are not counted. With [`keep_freed_memory`] it never shrinks.
pub fn heap_bytes() -> u64 {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallinfo2 takes the allocator's own locks and has no arguments.
        let found = unsafe { libc::mallinfo2() };
        found.arena as u64
    }
    #[cfg(not(target_env = "gnu"))]
    {
        0
    }
}

/// Tells glibc to keep freed memory in the process, and to serve large requests from the heap instead of
/// from mappings of their own, so that activations of one step reuse the pages of the last one instead
/// of faulting them in again. Returns whether it applied: false with another C library.
///
/// With `largest`, memory counts for more than time, as in a process that has a budget: requests of that many bytes and
/// more get mappings of their own all the same and leave the process when they are freed, and all threads share one
/// heap, so that what one of them frees serves the others. Compute threads then wait for one another at its lock.
///
/// Without `largest`, each thread has a heap of its own where the main thread calls, and shares one where another does:
/// requests of 64 MiB and more fit the main thread's heap alone, and would be mapped and unmapped each time, so the thread
/// that trains has to use that one. Threads that already have a heap keep it, so call this early.
///
/// The settings hold for the whole process and cannot be taken back.
pub fn keep_freed_memory(largest: Option<i32>) -> bool {
    #[cfg(target_env = "gnu")]
    {
        let share = largest.is_some() || !is_main_thread();
        let settings = [
            // No request is served by a mapping of its own, which would be unmapped when freed.
            (
                libc::M_MMAP_MAX,
                if largest.is_some() { MAX_MAPPINGS } else { 0 },
            ),
            (libc::M_MMAP_THRESHOLD, largest.unwrap_or(DEFAULT_LARGEST)),
            // -1, the highest threshold: the top of the heap is never returned.
            (libc::M_TRIM_THRESHOLD, -1),
            // 0 is the C library's own choice: as many as there are threads, up to 8 a core.
            (libc::M_ARENA_MAX, i32::from(share)),
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

/// Whether the calling thread is the one that the process began with.
#[cfg(target_env = "gnu")]
fn is_main_thread() -> bool {
    // SAFETY: the call takes nothing and cannot fail.
    let thread = unsafe { libc::gettid() };
    // SAFETY: as above.
    thread == unsafe { libc::getpid() }
}

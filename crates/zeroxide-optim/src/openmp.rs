//! The OpenMP threads that another library of the process computes with.
//!
//! After a piece of work these threads spin for a while, waiting for more. Threads of another pool that are woken in
//! that time share cores with them and come late; they themselves are there at once.
#![expect(unsafe_code, reason = "calls into the OpenMP runtime that is loaded")]

use std::any::Any;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;

/// `GOMP_parallel(work, data, num_threads, flags)`: what compilers make of `#pragma omp parallel`.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
/// `omp_get_max_threads()`.
type MaxThreads = unsafe extern "C" fn() -> c_int;

/// An OpenMP runtime with GNU's entry points, which LLVM's and Intel's have as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenMp {
    parallel: Parallel,
    max_threads: MaxThreads,
}

/// What the threads of one parallel region share.
struct Region<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl OpenMp {
    /// The runtime that the process has loaded for all to see; None where there is none.
    pub(crate) fn loaded() -> Option<Self> {
        let (parallel, max_threads) =
            (address(c"GOMP_parallel")?, address(c"omp_get_max_threads")?);
        // SAFETY: a function of this name has this type in every OpenMP runtime that has it, and such a runtime is never
        // unloaded: its threads run in it.
        let parallel = unsafe { std::mem::transmute::<*mut c_void, Parallel>(parallel) };
        // SAFETY: as above.
        let max_threads = unsafe { std::mem::transmute::<*mut c_void, MaxThreads>(max_threads) };
        Some(Self {
            parallel,
            max_threads,
        })
    }

    /// Threads that a region begun by this thread would have.
    pub(crate) fn max_threads(self) -> usize {
        // SAFETY: the function takes nothing and reads a setting of the calling thread.
        usize::try_from(unsafe { (self.max_threads)() }).unwrap_or(0)
    }

    /// Runs `work` once on each of those threads, the calling one among them, and returns when all are done.
    ///
    /// # Panics
    /// If `work` panics on a thread, after the others have finished.
    pub(crate) fn run(self, work: &(dyn Fn() + Sync)) {
        let region = Region {
            work,
            panic: Mutex::new(None),
        };
        // SAFETY: `enter` gets the region that lives until the call returns, which is when all threads have left it;
        // what they share in it is `Sync`. Zero threads stands for as many as `max_threads` says, zero flags for none.
        unsafe {
            (self.parallel)(enter, (&raw const region).cast_mut().cast(), 0, 0);
        }
        let panic = region.panic.into_inner().expect("no thread panics with it");
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Where the function `name` is that any library of the process shows to all.
fn address(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `dlsym` looks a name up that ends with a zero byte, and has no other effect.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// What each thread of a region calls; a panic must not leave it for the runtime.
extern "C" fn enter(region: *mut c_void) {
    // SAFETY: `run` passes the address of its region, which outlives all threads in it and is only read.
    let region = unsafe { &*region.cast_const().cast::<Region<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(region.work))
        && let Ok(mut first) = region.panic.lock()
    {
        first.get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A runtime whose regions have three threads, one after the other.
    extern "C" fn three(work: extern "C" fn(*mut c_void), data: *mut c_void, _: c_uint, _: c_uint) {
        for _ in 0..3 {
            work(data);
        }
    }

    extern "C" fn says_three() -> c_int {
        3
    }

    const FAKE: OpenMp = OpenMp {
        parallel: three,
        max_threads: says_three,
    };

    #[test]
    fn every_thread_of_a_region_works() {
        let entered = AtomicUsize::new(0);
        FAKE.run(&|| {
            entered.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!((entered.into_inner(), FAKE.max_threads()), (3, 3));
    }

    #[test]
    fn a_panic_leaves_the_runtime_alone_and_reaches_the_caller() {
        let entered = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            FAKE.run(&|| {
                let number = entered.fetch_add(1, Ordering::Relaxed);
                assert!(number != 0, "the first one fails");
            });
        }));
        let panic = outcome.expect_err("a thread has panicked");
        assert_eq!(panic.downcast_ref(), Some(&"the first one fails"));
        assert_eq!(entered.into_inner(), 3);
    }

    /// A runtime of two threads, of which the first flushes denormals.
    #[cfg(target_arch = "x86_64")]
    extern "C" fn first_flushes(
        work: extern "C" fn(*mut c_void),
        data: *mut c_void,
        _: c_uint,
        _: c_uint,
    ) {
        let address = data.expose_provenance();
        let other = std::thread::spawn(move || {
            let mode = 0x9fc0_u32;
            // SAFETY: the instruction reads a valid `u32`: the default word of control, and the two bits for denormals.
            unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode) };
            work(std::ptr::with_exposed_provenance_mut(address));
        });
        other.join().expect("nothing panics");
        work(data);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_thread_of_other_arithmetic_takes_no_item() {
        let runtime = OpenMp {
            parallel: first_flushes,
            max_threads: says_three,
        };
        let pool = crate::Pool::new(2).expect("threads").with_openmp(runtime);
        let caller = std::thread::current().id();
        pool.run_each(vec![(); 8], |_, ()| {
            assert_eq!(std::thread::current().id(), caller);
        });
    }
}

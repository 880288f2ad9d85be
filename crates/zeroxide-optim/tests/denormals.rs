//! A caller whose arithmetic flushes denormals, as after `torch.set_flush_denormal(True)`, gets the results of one whose
//! does not.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "sets a thread's mode of arithmetic")]

use std::arch::asm;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};

use zeroxide_optim::Pool;

/// Sets whether this thread takes denormal numbers for zero, in operands and in results.
fn flush_denormals(flush: bool) {
    let mut mode = 0_u32;
    // SAFETY: both instructions move the control word of the calling thread from and to a valid `u32`; the two bits
    // that change are about denormals alone.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut mode) };
    mode = if flush { mode | 0x8040 } else { mode & !0x8040 };
    // SAFETY: as above.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const mode) };
}

/// For each of `items` items whether its thread flushes.
fn flushing(pool: &Pool, items: usize) -> Vec<bool> {
    let mut found = vec![false; items];
    pool.run_each(found.iter_mut().collect(), |_, found| *found = flushes());
    found
}

fn flushes() -> bool {
    black_box(f32::from_bits(1)) * black_box(1.0) == 0.0
}

#[test]
fn a_pool_of_one_thread_has_its_own_arithmetic_too() {
    let pool = Pool::new(1).expect("threads");
    flush_denormals(true);
    let flushed = AtomicBool::new(false);
    pool.run(1, |_| flushed.store(flushes(), Ordering::Relaxed));
    flush_denormals(false);
    assert!(!flushed.into_inner());
}

#[test]
fn items_have_the_arithmetic_of_the_pool_whatever_the_callers_is() {
    for items in [1, 2, 50] {
        let plain = Pool::new(2).expect("threads");
        flush_denormals(true);
        let inherits = Pool::new(2).expect("threads");
        assert_eq!(flushing(&plain, items), vec![false; items]);
        assert_eq!(flushing(&inherits, items), vec![true; items]);
        flush_denormals(false);
        assert_eq!(flushing(&plain, items), vec![false; items]);
        assert_eq!(flushing(&inherits, items), vec![true; items]);
    }
}

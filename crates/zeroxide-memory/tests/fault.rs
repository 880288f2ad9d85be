//! A read of a window with nothing under it waits for the memory; a fault anywhere else is still one.
#![expect(unsafe_code, reason = "reads addresses with nothing under them")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use zeroxide_memory::{Bucket, Budget, FRAME, FaultNet, FramePool, Window};

fn read(address: usize) -> u8 {
    // SAFETY: the address is in a window, whose net puts memory there before the read ends.
    unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

#[test]
fn readers_get_what_the_service_puts_there() {
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, 2).unwrap();
    let windows: Vec<Window> = (0..2).map(|_| Window::reserve(FRAME).unwrap()).collect();
    let bases: Vec<usize> = windows
        .iter()
        .map(|w| w.base().expose_provenance())
        .collect();
    let ranges: Vec<_> = bases.iter().map(|&base| base..base + FRAME).collect();
    let windows = Arc::new(Mutex::new(windows));
    let calls = Arc::new(AtomicUsize::new(0));
    let (shared, counted) = (Arc::clone(&windows), Arc::clone(&calls));
    let net = FaultNet::spread(&ranges, move |index| {
        counted.fetch_add(1, Ordering::SeqCst);
        let window = &mut shared.lock().unwrap()[index];
        if !window.is_mapped() {
            window.load(pool.take(1).unwrap()).unwrap();
            window
                .lease(0..FRAME)
                .unwrap()
                .fill(u8::try_from(index).unwrap() + 7);
            window.publish().unwrap();
        }
    })
    .unwrap();
    for round in 0..200 {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let bases = &bases;
                scope.spawn(move || {
                    let index = (thread + round) % 2;
                    let at = bases[index] + (thread * 4099 + round * 17) % FRAME;
                    assert_eq!(usize::from(read(at)), index + 7);
                });
            }
        });
        for window in windows.lock().unwrap().iter_mut() {
            drop(window.unmap().unwrap());
        }
    }
    assert!(calls.load(Ordering::SeqCst) >= 400);
    drop(net);
}

#[test]
fn what_is_loading_cannot_be_seen() {
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, 1).unwrap();
    let window = Window::reserve(FRAME).unwrap();
    let base = window.base().expose_provenance();
    let window = Arc::new(Mutex::new(window));
    window.lock().unwrap().load(pool.take(1).unwrap()).unwrap();
    window.lock().unwrap().lease(0..FRAME).unwrap().fill(1);
    let shared = Arc::clone(&window);
    let _net = FaultNet::spread(std::slice::from_ref(&(base..base + FRAME)), move |_| {
        let mut window = shared.lock().unwrap();
        window.lease(0..FRAME).unwrap().fill(2);
        window.publish().unwrap();
    })
    .unwrap();
    assert_eq!(read(base + 5), 2);
}

#[test]
fn other_faults_end_the_process_as_ever() {
    let budget = Budget::new(None);
    let _pool = FramePool::new(&budget, Bucket::Gathered, 1).unwrap();
    let window = Window::reserve(FRAME).unwrap();
    let outside = Window::reserve(FRAME).unwrap();
    let base = window.base().expose_provenance();
    let _net = FaultNet::spread(std::slice::from_ref(&(base..base + FRAME)), |_| ()).unwrap();
    let address = outside.base().expose_provenance();
    // SAFETY: the child only reads and leaves; it is expected not to come back from the read.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: has the child ended by another signal should it hang.
        unsafe { libc::alarm(5) };
        let _ = read(address);
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFSIGNALED(status), "status {status}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
}

#[test]
fn a_window_that_cannot_be_filled_reads_as_zero() {
    let window = Window::reserve(FRAME).unwrap();
    let base = window.base().expose_provenance();
    let window = Arc::new(Mutex::new(window));
    let shared = Arc::clone(&window);
    let _net = FaultNet::spread(std::slice::from_ref(&(base..base + FRAME)), move |_| {
        shared.lock().unwrap().blank().unwrap();
    })
    .unwrap();
    assert_eq!(read(base + 1), 0);
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, 1).unwrap();
    let mut window = window.lock().unwrap();
    window.map(pool.take(1).unwrap()).unwrap();
    window.lease(0..FRAME).unwrap().fill(3);
    assert_eq!(read(base + 1), 3);
}

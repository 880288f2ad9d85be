//! The last net under windows: a thread that reads a window with no memory under it waits until that is there.
//!
//! A view of a weight can outlive the moment at which its unit is let go, in ways that no hook sees. Its reader gets a
//! SIGSEGV from the kernel, on its own thread, at the very instruction. The handler here asks a service thread for the
//! memory, sleeps until it has come, and lets the instruction run again. Faults anywhere else go to the handler that
//! was
//! installed before, as if there were none here.
//!
//! The handler does only what is allowed where it may have interrupted anything: atomics, `write` to an event counter
//! and
//! a futex wait. All else, locks among it, is the service thread's.
#![expect(unsafe_code, reason = "a signal handler, and what it may call")]

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use libc::{c_int, c_void};

use crate::MemoryError;

/// Nets that can be spread at once in one process.
const NETS: usize = 64;

/// Nobody waits for the range.
const IDLE: u32 = 0;
/// A thread waits for the range.
const WANTED: u32 = 1;

/// One place for a net. `active` counts the handlers that may be using the pointer; whoever clears the pointer waits
/// until there are none.
struct Slot {
    net: AtomicPtr<Net>,
    active: AtomicUsize,
}

static SLOTS: [Slot; NETS] = [const {
    Slot {
        net: AtomicPtr::new(ptr::null_mut()),
        active: AtomicUsize::new(0),
    }
}; NETS];

/// What to do with faults that are not ours: the action that was there before this one.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// The last fault that was not ours, and how often it has come in a row.
static FOREIGN: AtomicUsize = AtomicUsize::new(0);
static REPEATED: AtomicU32 = AtomicU32::new(0);
/// Times that a fault may come back from the handler before. One that prints and returns, and was installed over this
/// one,
/// does so for ever.
const REPEATS: u32 = 3;
/// Serialises installing.
static INSTALL: Mutex<()> = Mutex::new(());

/// Ranges of one owner, in order of address.
struct Net {
    ranges: Vec<Range<usize>>,
    wanted: Vec<AtomicU32>,
    process: u32,
    /// An eventfd that is raised for every request.
    eventfd: c_int,
    ending: AtomicI32,
}

/// Gives memory to whoever reads one of its ranges, until it is dropped.
pub struct FaultNet {
    slot: usize,
    net: Arc<Net>,
    service: Option<JoinHandle<()>>,
}

impl FaultNet {
    /// Spreads the net under `ranges` of addresses, which do not overlap and fault where there is no memory. `resolve`
    /// is
    /// called on a thread of its own with a range's place in the list, and returns when the range can be read.
    ///
    /// # Errors
    /// [`MemoryError::Os`], also when there are too many nets in the process.
    pub fn spread(
        ranges: &[Range<usize>],
        resolve: impl Fn(usize) + Send + 'static,
    ) -> Result<Self, MemoryError> {
        let failed = |call, source| MemoryError::Os {
            call,
            bytes: 0,
            source,
        };
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        order.sort_by_key(|&index| ranges[index].start);
        // SAFETY: makes a new descriptor.
        let eventfd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if eventfd < 0 {
            return Err(failed("eventfd", io::Error::last_os_error()));
        }
        let net = Arc::new(Net {
            ranges: order.iter().map(|&index| ranges[index].clone()).collect(),
            wanted: order.iter().map(|_| AtomicU32::new(IDLE)).collect(),
            process: std::process::id(),
            eventfd,
            ending: AtomicI32::new(0),
        });
        install().map_err(|source| failed("sigaction (SIGSEGV)", source))?;
        let served = Arc::clone(&net);
        let service = std::thread::Builder::new()
            .name("zeroxide-faults".into())
            .spawn(move || serve(&served, &order, resolve))
            .map_err(|source| failed("thread for faults", source))?;
        let pointer = Arc::as_ptr(&net).cast_mut();
        let free = |slot: &Slot| {
            slot.net
                .compare_exchange(ptr::null_mut(), pointer, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        };
        let found = SLOTS.iter().position(free);
        let mut this = Self {
            slot: found.unwrap_or(NETS),
            net,
            service: Some(service),
        };
        if found.is_none() {
            this.end();
            return Err(failed(
                "more than 64 engines at once",
                io::Error::from(io::ErrorKind::OutOfMemory),
            ));
        }
        Ok(this)
    }

    /// Makes sure that faults still come here first, though somebody may have installed a handler since.
    ///
    /// # Errors
    /// [`MemoryError::Os`].
    pub fn keep(&self) -> Result<(), MemoryError> {
        install().map_err(|source| MemoryError::Os {
            call: "sigaction (SIGSEGV)",
            bytes: 0,
            source,
        })
    }

    fn end(&mut self) {
        if let Some(slot) = SLOTS.get(self.slot) {
            slot.net.store(ptr::null_mut(), Ordering::SeqCst);
        }
        self.net.ending.store(1, Ordering::SeqCst);
        signal(self.net.eventfd);
        if let Some(service) = self.service.take() {
            // A panic there has been printed; whoever waits is let go below.
            let _ = service.join();
        }
        for wanted in &self.net.wanted {
            answer(wanted);
        }
        if let Some(slot) = SLOTS.get(self.slot) {
            while slot.active.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
        }
    }
}

impl Drop for FaultNet {
    fn drop(&mut self) {
        if std::process::id() == self.net.process {
            self.end();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // SAFETY: the descriptor was made by `spread`, and nobody has it any more.
        unsafe { libc::close(self.eventfd) };
    }
}

/// The service thread: resolves what is wanted, until the net ends.
fn serve(net: &Net, order: &[usize], resolve: impl Fn(usize)) {
    loop {
        let mut count = 0_u64;
        // SAFETY: reads eight bytes into a local.
        let read = unsafe { libc::read(net.eventfd, (&raw mut count).cast::<c_void>(), 8) };
        if net.ending.load(Ordering::SeqCst) != 0 {
            return;
        }
        if read != 8 {
            // Interrupted. Nothing else can happen to an eventfd that blocks.
            continue;
        }
        for (wanted, index) in net.wanted.iter().zip(order) {
            if wanted.load(Ordering::SeqCst) == WANTED {
                resolve(*index);
                answer(wanted);
            }
        }
    }
}

/// Lets whoever waits for the range try again.
fn answer(wanted: &AtomicU32) {
    wanted.store(IDLE, Ordering::SeqCst);
    // SAFETY: wakes the threads that sleep on this word, which outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            wanted.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            c_int::MAX,
        )
    };
}

fn signal(eventfd: c_int) {
    let one = 1_u64;
    // SAFETY: writes eight bytes of a local. An event counter that is full is raised already.
    unsafe { libc::write(eventfd, (&raw const one).cast::<c_void>(), 8) };
}

/// Installs the handler unless it is the one in place.
fn install() -> io::Result<()> {
    // SAFETY: a sigaction of zeros is valid.
    let mut present: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks.
    if unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), &raw mut present) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let ours = handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    if present.sa_sigaction == ours as usize {
        return Ok(());
    }
    let _only_one = INSTALL.lock().unwrap_or_else(PoisonError::into_inner);
    // A handler may be reading the action before at any time: it is never freed. There are few.
    BEFORE.store(Box::into_raw(Box::new(present)), Ordering::SeqCst);
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ours as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler is a function of the right kind and lives as long as the process: an extension module is
    // never
    // unloaded.
    if unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo that is valid during the call.
    let Some(about) = (unsafe { info.as_ref() }) else {
        return;
    };
    // SAFETY: a SIGSEGV comes with an address.
    let address = unsafe { about.si_addr() } as usize;
    // SAFETY: the thread's own errno; whatever was interrupted finds it as it was.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    let caught = SLOTS.iter().any(|slot| catch(slot, address));
    // SAFETY: as above.
    unsafe { *errno = kept };
    if !caught {
        pass_on(signal, address, info, context);
    }
}

/// Waits for memory at `address` if it is in the slot's net. Called in the handler.
fn catch(slot: &Slot, address: usize) -> bool {
    slot.active.fetch_add(1, Ordering::SeqCst);
    let net = slot.net.load(Ordering::SeqCst);
    // SAFETY: whoever clears the pointer keeps the net until `active` is 0.
    let caught = unsafe { net.as_ref() }.is_some_and(|net| net.wait_for(address));
    slot.active.fetch_sub(1, Ordering::SeqCst);
    caught
}

impl Net {
    /// Called in the handler.
    fn wait_for(&self, address: usize) -> bool {
        // SAFETY: asks for a number.
        if unsafe { libc::getpid() }.cast_unsigned() != self.process {
            // Nobody serves a forked child.
            return false;
        }
        let at = self.ranges.partition_point(|range| range.end <= address);
        if !self
            .ranges
            .get(at)
            .is_some_and(|range| range.contains(&address))
        {
            return false;
        }
        let wanted = &self.wanted[at];
        wanted.store(WANTED, Ordering::SeqCst);
        signal(self.eventfd);
        while wanted.load(Ordering::SeqCst) == WANTED && self.ending.load(Ordering::SeqCst) == 0 {
            // SAFETY: sleeps while the word, which lives as long as the net, has that value.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    wanted.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    WANTED,
                    ptr::null::<libc::timespec>(),
                )
            };
        }
        self.ending.load(Ordering::SeqCst) == 0
    }
}

/// Does what would have been done without this handler.
fn pass_on(signal: c_int, address: usize, info: *mut libc::siginfo_t, context: *mut c_void) {
    if FOREIGN.swap(address, Ordering::SeqCst) != address {
        REPEATED.store(0, Ordering::SeqCst);
    } else if REPEATED.fetch_add(1, Ordering::SeqCst) >= REPEATS {
        // SAFETY: puts the default action in place, which ends the process at the next try of the instruction.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: actions before are never freed.
    let Some(before) = (unsafe { BEFORE.load(Ordering::SeqCst).as_ref() }) else {
        return;
    };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction faults again and then ends the process, with the state in which it was.
            // SAFETY: puts the default action in place.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: whoever installed it with SA_SIGINFO has made it a function of this kind.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: whoever installed it without SA_SIGINFO has made it a function of this kind.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

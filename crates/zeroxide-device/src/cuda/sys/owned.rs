//! What is owned on a device: its context, memory, registrations, streams and events.
//!
//! Each owner keeps what it needs alive, makes the context current for each of its calls and puts back what was current
//! before, so that torch, which uses the same context, finds its own. In a forked child every call is refused and
//! dropping does nothing: the driver does not work there.
#![expect(
    unsafe_code,
    reason = "calls into NVIDIA's driver with what is owned here"
)]

use std::any::Any;
use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;

use zeroxide_memory::{ForkGuard, Lease, Reservation};

use super::driver::{DeviceAttribute, Driver, code};
use crate::cuda::error::{CudaError, Result};

/// Streams that do not wait for the default stream, and it not for them.
const NON_BLOCKING: u32 = 1;
/// Events that take no time.
const DISABLE_TIMING: u32 = 2;
/// Registrations that hold for all contexts.
const PORTABLE: u32 = 1;

/// The context of a device that all of a process share, torch among them; kept until this is dropped.
pub(crate) struct Primary {
    pub(super) driver: Driver,
    device: c_int,
    pub(super) number: u32,
    handle: usize,
    fork: ForkGuard,
}

/// While it lives the context is current on this thread.
pub(super) struct Current<'a>(&'a Primary);

impl Primary {
    /// Takes a part in the context of device `number`.
    pub(crate) fn retain(driver: Driver, number: u32) -> Result<Self> {
        let device = driver.device(number)?;
        let mut handle = 0;
        // SAFETY: the function fills in a handle for a device that there is.
        let status = unsafe { (driver.functions.context_retain)(&raw mut handle, device) };
        driver.check("cuDevicePrimaryCtxRetain", number, status)?;
        Ok(Self {
            driver,
            device,
            number,
            handle,
            fork: ForkGuard::new(),
        })
    }

    /// The driver.
    pub(crate) fn driver(&self) -> &Driver {
        &self.driver
    }

    /// The device's number, from 0.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// What the maker calls the device.
    pub(crate) fn name(&self) -> Result<String> {
        self.driver.name(self.device)
    }

    /// A number of the device's.
    pub(crate) fn attribute(&self, which: DeviceAttribute) -> Result<u32> {
        self.driver.attribute(self.device, which)
    }

    /// Free bytes and all bytes.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let _current = self.enter()?;
        Ok(self.driver.memory())
    }

    pub(super) fn enter(&self) -> Result<Current<'_>> {
        self.fork.check_process()?;
        // SAFETY: the context is retained for as long as `self` is there.
        let status = unsafe { (self.driver.functions.context_push)(self.handle) };
        self.check("cuCtxPushCurrent", status)?;
        Ok(Current(self))
    }

    pub(super) fn check(&self, call: &'static str, status: c_int) -> Result<()> {
        self.driver.check(call, self.number, status)
    }

    /// Waits for everything that runs in the context, which is current.
    pub(super) fn wait(&self) {
        // SAFETY: the function takes nothing. What it says of an earlier failure is said again by every other call.
        unsafe { (self.driver.functions.context_wait)() };
    }

    /// Runs `end` with the context current, where that can be; what it returns is of no use to who drops.
    pub(super) fn end(&self, end: impl FnOnce()) {
        if let Ok(_current) = self.enter() {
            end();
        }
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut found = 0;
        // SAFETY: the context was pushed on this thread by `enter`, and what was pushed since is popped.
        unsafe { (self.0.driver.functions.context_pop)(&raw mut found) };
        debug_assert_eq!(
            found, self.0.handle,
            "contexts are popped as they were pushed"
        );
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        if !self.fork.is_forked() {
            // SAFETY: `retain` has taken this part, and everything that is made in the context holds `self`.
            unsafe { (self.driver.functions.context_release)(self.device) };
        }
    }
}

impl fmt::Debug for Primary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Primary")
            .field("device", &self.number)
            .finish_non_exhaustive()
    }
}

/// Memory on the device, given back once this is dropped.
#[derive(Debug)]
pub(crate) struct Allocation {
    context: Arc<Primary>,
    address: u64,
    bytes: usize,
    _counted: Reservation,
}

impl Allocation {
    /// Memory of `bytes`, which `counted` counts.
    pub(crate) fn new(context: Arc<Primary>, bytes: usize, counted: Reservation) -> Result<Self> {
        let current = context.enter()?;
        let mut address = 0;
        // SAFETY: the function fills in an address.
        let status = unsafe { (context.driver.functions.allocate)(&raw mut address, bytes) };
        if status == code::OUT_OF_MEMORY {
            let (free, total) = context.driver.memory();
            return Err(CudaError::OutOfMemory {
                what: "compute memory",
                need: bytes as u64,
                free,
                total,
                device: context.number,
            });
        }
        context.check("cuMemAlloc", status)?;
        drop(current);
        Ok(Self {
            context,
            address,
            bytes,
            _counted: counted,
        })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `new` has got this address, and every copy that uses it holds `self` until it has ended.
        self.context.end(|| unsafe {
            (self.context.driver.functions.free)(self.address);
        });
    }
}

/// Host memory that the device copies from and to by itself, until this is dropped.
pub(crate) struct Registered {
    context: Arc<Primary>,
    address: usize,
    /// Keeps the pages where they are.
    _anchor: Arc<dyn Any + Send + Sync>,
}

impl Registered {
    /// Registers the bytes of a lease where they are, exactly these. Errors with the driver's words.
    pub(crate) fn new(
        context: Arc<Primary>,
        memory: &Lease,
    ) -> Result<std::result::Result<Self, String>> {
        let address = memory.as_ptr().expose_provenance();
        let current = context.enter()?;
        // SAFETY: the bytes are the lease's, and the anchor keeps memory under their addresses until they are
        // unregistered. Registering them changes none.
        let status =
            unsafe { (context.driver.functions.register)(address, memory.len(), PORTABLE) };
        if status != 0 {
            return Ok(Err(context.driver.reason(status)));
        }
        drop(current);
        Ok(Ok(Self {
            context,
            address,
            _anchor: memory.anchor(),
        }))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.context.end(|| {
            // Copies that began with these pages end with them.
            self.context.wait();
            // SAFETY: `new` has registered this address, and it is unregistered once, with no copy under way.
            unsafe { (self.context.driver.functions.unregister)(self.address) };
        });
    }
}

/// A stream of our own. Dropping it waits for all that it has to do.
#[derive(Debug)]
pub(crate) struct OwnedStream {
    context: Arc<Primary>,
    handle: usize,
}

/// A point of a stream.
#[derive(Debug)]
pub(crate) struct OwnedEvent {
    context: Arc<Primary>,
    handle: usize,
}

/// A copy that the device may be busy with: it has the memory of both sides until it has ended.
pub(crate) struct Pending {
    event: OwnedEvent,
    lease: Lease,
    _memory: Arc<Allocation>,
}

/// Which way a copy goes.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    Up,
    Down,
}

impl OwnedStream {
    pub(crate) fn new(context: Arc<Primary>) -> Result<Self> {
        let current = context.enter()?;
        let mut handle = 0;
        // SAFETY: the function fills in a handle.
        let status =
            unsafe { (context.driver.functions.stream_create)(&raw mut handle, NON_BLOCKING) };
        context.check("cuStreamCreate", status)?;
        drop(current);
        Ok(Self { context, handle })
    }

    /// Copies all of `lease` to or from `memory`, from its byte `at` on, behind all that the stream has to do.
    ///
    /// The caller has checked that the bytes are there: `at + lease.len() <= memory.len()`.
    pub(crate) fn copy(
        &self,
        way: Way,
        mut lease: Lease,
        memory: &Arc<Allocation>,
        at: usize,
    ) -> Result<Pending> {
        assert!(
            at.checked_add(lease.len())
                .is_some_and(|end| end <= memory.bytes),
            "a copy is within its memory"
        );
        let event = OwnedEvent::new(Arc::clone(&self.context))?;
        let current = self.context.enter()?;
        let functions = &self.context.driver.functions;
        let (host, bytes) = (lease.as_mut_ptr().expose_provenance(), lease.len());
        let device = memory.address + at as u64;
        let (call, status) = match way {
            // SAFETY: both ranges are there, checked above, and `Pending` keeps both until the copy has ended. The
            // lease is the one owner of its bytes, so that nothing writes them meanwhile.
            Way::Up => ("cuMemcpyHtoDAsync", unsafe {
                (functions.copy_up)(device, host, bytes, self.handle)
            }),
            // SAFETY: as above, and nothing reads the bytes meanwhile.
            Way::Down => ("cuMemcpyDtoHAsync", unsafe {
                (functions.copy_down)(host, device, bytes, self.handle)
            }),
        };
        self.context.check(call, status)?;
        let pending = Pending {
            event,
            lease,
            _memory: Arc::clone(memory),
        };
        // SAFETY: both handles are alive.
        let status = unsafe { (functions.event_record)(pending.event.handle, self.handle) };
        if status != 0 {
            // Without its event the end of the copy is not known: all of the stream ends, or the memory stays for ever.
            // SAFETY: the stream is alive.
            if unsafe { (functions.stream_wait)(self.handle) } != 0 {
                pending.abandon();
            }
            self.context.check("cuEventRecord", status)?;
            unreachable!("a code that is not 0 is an error");
        }
        drop(current);
        Ok(pending)
    }

    /// The point after all that the stream has to do.
    pub(crate) fn record(&self) -> Result<OwnedEvent> {
        let event = OwnedEvent::new(Arc::clone(&self.context))?;
        let _current = self.context.enter()?;
        // SAFETY: both handles are alive.
        let status =
            unsafe { (self.context.driver.functions.event_record)(event.handle, self.handle) };
        self.context.check("cuEventRecord", status)?;
        Ok(event)
    }

    /// What the stream is given from now on begins when `event` has come.
    pub(crate) fn wait_for(&self, event: &OwnedEvent) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both handles are alive. The driver remembers the event's point, also when the event is destroyed.
        let status = unsafe {
            (self.context.driver.functions.stream_wait_event)(self.handle, event.handle, 0)
        };
        self.context.check("cuStreamWaitEvent", status)
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        let functions = &self.context.driver.functions;
        self.context.end(|| {
            // SAFETY: the stream is alive.
            unsafe { (functions.stream_wait)(self.handle) };
            // SAFETY: `new` has made the stream, and it is destroyed once.
            unsafe { (functions.stream_destroy)(self.handle) };
        });
    }
}

impl OwnedEvent {
    fn new(context: Arc<Primary>) -> Result<Self> {
        let current = context.enter()?;
        let mut handle = 0;
        // SAFETY: the function fills in a handle.
        let status =
            unsafe { (context.driver.functions.event_create)(&raw mut handle, DISABLE_TIMING) };
        context.check("cuEventCreate", status)?;
        drop(current);
        Ok(Self { context, handle })
    }

    /// Whether it has come; never waits.
    pub(crate) fn has_come(&self) -> Result<bool> {
        let _current = self.context.enter()?;
        // SAFETY: the event is alive.
        let status = unsafe { (self.context.driver.functions.event_query)(self.handle) };
        if status == code::NOT_READY {
            return Ok(false);
        }
        self.context.check("cuEventQuery", status)?;
        Ok(true)
    }

    /// Returns when it has come.
    pub(crate) fn wait(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the event is alive.
        let status = unsafe { (self.context.driver.functions.event_wait)(self.handle) };
        self.context.check("cuEventSynchronize", status)
    }
}

impl Drop for OwnedEvent {
    fn drop(&mut self) {
        // SAFETY: `new` has made the event, and it is destroyed once.
        self.context.end(|| unsafe {
            (self.context.driver.functions.event_destroy)(self.handle);
        });
    }
}

impl Pending {
    /// Waits for the end and gives the host memory back. Where the end cannot be known the memory is kept for ever,
    /// since the device may still write it.
    pub(crate) fn finish(self) -> Result<Lease> {
        match self.event.wait() {
            Ok(()) => Ok(self.lease),
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    fn abandon(self) {
        std::mem::forget(self);
    }
}

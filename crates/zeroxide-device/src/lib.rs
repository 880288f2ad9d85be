//! Where compute memory is, and how bytes get there and back.
//!
//! A [`Device`] has memory of its own and [`Stream`]s, on which copies run one after the other while the caller goes
//! on. A copy takes its host memory and gives it back when it is done, so that nobody frees or touches it meanwhile;
//! the device's memory stays with the caller, since everything that uses it is ordered by streams. An [`Event`] marks
//! a point of a stream, for which another stream or the caller waits.
//!
//! [`Host`] computes in host memory: its copies are done when they return. A [`cuda::Context`] is an NVIDIA device.
//! `tests/conformance` holds what every device has to keep to, however late its copies really run.

#![deny(unsafe_code)]

pub mod cuda;
mod error;
mod host;

pub use error::{DeviceError, Result};
pub use host::{Host, HostEvent, HostMemory, HostStream};
use zeroxide_memory::{Bucket, Budget, Lease};

/// A place that computes.
pub trait Device {
    /// A range of its memory. It is given back once it is dropped and no copy uses it any more.
    type Memory: Send;
    /// An order of copies.
    type Stream: Stream<Memory = Self::Memory, Event = Self::Event>;
    /// A point in such an order.
    type Event: Event;

    /// Memory of `bytes` on the device, counted in `bucket` of `budget`. What it holds is not defined.
    fn allocate(&self, budget: &Budget, bucket: Bucket, bytes: usize) -> Result<Self::Memory>;

    /// Prepares host memory for copies that run beside the caller, and returns what ends that when it is dropped.
    ///
    /// The lease may be used as before. Copies of memory that is not registered are as right, and may be slower.
    fn register(&self, memory: &Lease) -> Result<Registration>;

    /// A new stream, in no order with others.
    fn stream(&self) -> Result<Self::Stream>;
}

/// Copies in order. Dropping a stream waits for all of them.
pub trait Stream {
    /// The device's memory.
    type Memory;
    /// The device's events.
    type Event;

    /// Copies all of `from` to the device, from byte `at` of `to` on. A copy that is refused drops `from`.
    fn upload(&mut self, from: Lease, to: &Self::Memory, at: usize) -> Result<Transfer>;

    /// Fills `to` with the device's bytes from byte `at` of `from` on. A copy that is refused drops `to`.
    fn download(&mut self, from: &Self::Memory, at: usize, to: Lease) -> Result<Transfer>;

    /// The point after everything that was given to the stream so far.
    fn record(&mut self) -> Result<Self::Event>;

    /// What is given to the stream from now on begins when `event` has come.
    fn wait_for(&mut self, event: &Self::Event) -> Result<()>;
}

/// A point of a stream.
pub trait Event: Clone + Send {
    /// Whether everything before it is done; never waits.
    fn has_come(&self) -> Result<bool>;

    /// Returns when everything before it is done.
    fn wait(&self) -> Result<()>;
}

/// A copy under way, which holds the host memory of it. Dropping it waits for its end.
#[must_use = "the copy has the host memory until it is waited for"]
pub struct Transfer {
    end: Option<End>,
}

/// Waits for a copy and gives its host memory back.
type End = Box<dyn FnOnce() -> Result<Lease> + Send>;

impl Transfer {
    /// A copy whose end is what `end` waits for.
    pub fn new(end: impl FnOnce() -> Result<Lease> + Send + 'static) -> Self {
        Self {
            end: Some(Box::new(end)),
        }
    }

    /// Waits for the end and gives the host memory back.
    ///
    /// # Panics
    /// Never: nothing else takes the end.
    pub fn wait(mut self) -> Result<Lease> {
        let end = self.end.take().expect("a copy ends once");
        end()
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            // The memory goes back after the copy, whether or not that was right.
            drop(end());
        }
    }
}

/// Host memory that is prepared for a device, until this is dropped.
#[must_use = "dropping it ends the registration"]
pub struct Registration {
    _end: Option<Box<dyn Send + Sync>>,
}

impl Registration {
    /// A registration that has nothing to end.
    pub fn nothing() -> Self {
        Self { _end: None }
    }

    /// A registration that ends when `end` is dropped.
    pub fn until_dropped(end: Box<dyn Send + Sync>) -> Self {
        Self { _end: Some(end) }
    }
}

//! The host as a device: compute memory is host memory, and a copy is done when it returns.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zeroxide_memory::{Arena, Bucket, Budget, Lease};

use crate::{Device, DeviceError, Event, Registration, Result, Stream, Transfer};

/// Alignment of compute memory, in bytes: that of a cache line, and of every parameter in its unit at least.
const ALIGN: usize = 64;

/// The host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

/// Compute memory on the host.
#[derive(Debug)]
pub struct HostMemory(Mutex<Lease>);

/// An order of copies on the host, where each is done before the next is given.
#[derive(Debug)]
pub struct HostStream;

/// A point that has come.
#[derive(Clone, Debug)]
pub struct HostEvent;

impl HostMemory {
    /// The bytes, for those who compute on the host.
    pub fn bytes(&self) -> MutexGuard<'_, Lease> {
        // Whoever panicked while writing left bytes, and any bytes are allowed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes `at .. at + count` of `size`. Errors when they are not all there.
fn part(size: usize, at: usize, count: usize) -> Result<Range<usize>> {
    match at.checked_add(count) {
        Some(end) if end <= size => Ok(at..end),
        _ => Err(DeviceError::OutOfRange { at, count, size }),
    }
}

impl Device for Host {
    type Memory = HostMemory;
    type Stream = HostStream;
    type Event = HostEvent;

    fn allocate(&self, budget: &Budget, bucket: Bucket, bytes: usize) -> Result<HostMemory> {
        let arena = Arena::new(budget, bucket, bytes)?;
        Ok(HostMemory(Mutex::new(arena.lease(bytes, ALIGN)?)))
    }

    fn register(&self, _: &Lease) -> Result<Registration> {
        Ok(Registration::nothing())
    }

    fn stream(&self) -> Result<HostStream> {
        Ok(HostStream)
    }
}

impl Stream for HostStream {
    type Memory = HostMemory;
    type Event = HostEvent;

    fn upload(&mut self, from: Lease, to: &HostMemory, at: usize) -> Result<Transfer> {
        let mut memory = to.bytes();
        let part = part(memory.len(), at, from.len())?;
        memory[part].copy_from_slice(&from);
        Ok(Transfer::new(move || Ok(from)))
    }

    fn download(&mut self, from: &HostMemory, at: usize, mut to: Lease) -> Result<Transfer> {
        let memory = from.bytes();
        let part = part(memory.len(), at, to.len())?;
        to.copy_from_slice(&memory[part]);
        Ok(Transfer::new(move || Ok(to)))
    }

    fn record(&mut self) -> Result<HostEvent> {
        Ok(HostEvent)
    }

    fn wait_for(&mut self, _: &HostEvent) -> Result<()> {
        Ok(())
    }
}

impl Event for HostEvent {
    fn has_come(&self) -> Result<bool> {
        Ok(true)
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}

//! A CUDA device as a [`Device`]: its memory, its streams and its events.

use std::sync::Arc;

use zeroxide_memory::{Bucket, Budget, Lease};

use super::context::Context;
use super::error::CudaError;
use super::sys::owned::{Allocation, OwnedEvent, OwnedStream, Registered, Way};
use crate::{Device, DeviceError, Event, Registration, Result, Stream, Transfer};

/// Memory of a CUDA device.
#[derive(Debug)]
pub struct CudaMemory(Arc<Allocation>);

/// A stream of our own, which waits for none of torch's unless it is told to.
#[derive(Debug)]
pub struct CudaStream(OwnedStream);

/// A point of a stream.
#[derive(Clone, Debug)]
pub struct CudaEvent(Arc<OwnedEvent>);

impl Device for Context {
    type Memory = CudaMemory;
    type Stream = CudaStream;
    type Event = CudaEvent;

    fn allocate(&self, budget: &Budget, bucket: Bucket, bytes: usize) -> Result<CudaMemory> {
        let counted = budget.reserve(bucket, bytes as u64)?;
        let memory = Allocation::new(Arc::clone(&self.primary), bytes, counted)?;
        Ok(CudaMemory(Arc::new(memory)))
    }

    /// Locks the lease's pages where they are. While they are registered the lease must not be discarded: the device
    /// would go on with the old pages.
    fn register(&self, memory: &Lease) -> Result<Registration> {
        match Registered::new(Arc::clone(&self.primary), memory)? {
            Ok(registered) => Ok(Registration::until_dropped(Box::new(registered))),
            Err(reason) => Err(DeviceError::Cuda(CudaError::Register {
                bytes: memory.len() as u64,
                limit: locked_limit(),
                device: self.device(),
                reason,
            })),
        }
    }

    fn stream(&self) -> Result<CudaStream> {
        Ok(CudaStream(OwnedStream::new(Arc::clone(&self.primary))?))
    }
}

/// How much memory this process may lock, in words.
fn locked_limit() -> String {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft {
        Some("unlimited") => String::from("unlimited"),
        Some(bytes) => format!("{bytes} bytes"),
        None => String::from("unknown"),
    }
}

impl CudaStream {
    fn copy(&self, way: Way, lease: Lease, memory: &CudaMemory, at: usize) -> Result<Transfer> {
        let (count, size) = (lease.len(), memory.0.len());
        if at.checked_add(count).is_none_or(|end| end > size) {
            return Err(DeviceError::OutOfRange { at, count, size });
        }
        let pending = self.0.copy(way, lease, &memory.0, at)?;
        Ok(Transfer::new(move || Ok(pending.finish()?)))
    }
}

impl Stream for CudaStream {
    type Memory = CudaMemory;
    type Event = CudaEvent;

    fn upload(&mut self, from: Lease, to: &CudaMemory, at: usize) -> Result<Transfer> {
        self.copy(Way::Up, from, to, at)
    }

    fn download(&mut self, from: &CudaMemory, at: usize, to: Lease) -> Result<Transfer> {
        self.copy(Way::Down, to, from, at)
    }

    fn record(&mut self) -> Result<CudaEvent> {
        Ok(CudaEvent(Arc::new(self.0.record()?)))
    }

    fn wait_for(&mut self, event: &CudaEvent) -> Result<()> {
        Ok(self.0.wait_for(&event.0)?)
    }
}

impl Event for CudaEvent {
    fn has_come(&self) -> Result<bool> {
        Ok(self.0.has_come()?)
    }

    fn wait(&self) -> Result<()> {
        Ok(self.0.wait()?)
    }
}

//! What disk traffic a run has had, and what it has cost: counted while calls run, read without waiting for any of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use zeroxide_storage::{IoCounters, Queue};

/// Traffic between disk and memory since the start.
#[derive(Clone, Debug)]
pub struct IoReport {
    /// What the queue has moved.
    pub counters: IoCounters,
    /// Time in which compute stood still for the disk.
    pub waited: Duration,
    /// Time that calls spent on optimizer steps, waiting included, wherever in forward or backward that was.
    pub updating: Duration,
    /// Tiles updated.
    pub tiles: u64,
    /// The engine in use, in words.
    pub engine: String,
}

/// A count that one thread adds to and any thread reads. Clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally(Arc<AtomicU64>);

impl Tally {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

/// A sum of times, counted as a [`Tally`] is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stopwatch(Tally);

impl Stopwatch {
    pub(crate) fn add(&self, more: Duration) {
        self.0
            .add(u64::try_from(more.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Where the parts of a report are counted.
#[derive(Clone)]
pub(crate) struct Traffic {
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) waited: Stopwatch,
    pub(crate) updating: Stopwatch,
    pub(crate) tiles: Tally,
}

impl Traffic {
    pub(crate) fn report(&self) -> IoReport {
        IoReport {
            counters: self.queue.counters(),
            waited: Duration::from_nanos(self.waited.0.get()),
            updating: Duration::from_nanos(self.updating.0.get()),
            tiles: self.tiles.get(),
            engine: self.queue.describe(),
        }
    }
}

//! What disk traffic a run has had, and what it has cost.

use std::time::Duration;

use zeroxide_storage::IoCounters;

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

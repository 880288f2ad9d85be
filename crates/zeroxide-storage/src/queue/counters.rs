//! Bytes, operations, and busy times of a queue.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zeroxide_memory::Recorder;

use super::operation::OpKind;

/// Totals of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindCounters {
    /// Bytes transferred, those of operations that failed later included.
    pub bytes: u64,
    /// Operations answered.
    pub operations: u64,
    /// Operations answered with an error.
    pub failed: u64,
    /// Time during which at least one operation of this direction was accepted and not yet answered.
    pub busy: Duration,
}

/// Totals of a queue since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoCounters {
    /// From disk to memory.
    pub read: KindCounters,
    /// From memory to disk.
    pub write: KindCounters,
    /// Time during which at least one operation of either direction was accepted and not yet answered.
    pub busy: Duration,
}

impl IoCounters {
    /// The totals of one direction.
    pub fn of(&self, kind: OpKind) -> &KindCounters {
        match kind {
            OpKind::Read => &self.read,
            OpKind::Write => &self.write,
        }
    }
}

/// Time during which a count is above zero.
#[derive(Debug, Default)]
struct Busy {
    outstanding: u64,
    since: Option<Instant>,
    total: Duration,
}

impl Busy {
    fn begin(&mut self, now: Instant) {
        self.outstanding += 1;
        self.since.get_or_insert(now);
    }

    fn end(&mut self, now: Instant) {
        self.outstanding = self.outstanding.saturating_sub(1);
        if self.outstanding == 0
            && let Some(since) = self.since.take()
        {
            self.total += now.saturating_duration_since(since);
        }
    }

    /// The total, the period that has not ended yet included.
    fn until(&self, now: Instant) -> Duration {
        let open = self.since.map(|since| now.saturating_duration_since(since));
        self.total + open.unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct Direction {
    bytes: u64,
    operations: u64,
    failed: u64,
    busy: Busy,
}

impl Direction {
    fn at(&self, now: Instant) -> KindCounters {
        KindCounters {
            bytes: self.bytes,
            operations: self.operations,
            failed: self.failed,
            busy: self.busy.until(now),
        }
    }
}

#[derive(Debug, Default)]
struct Totals {
    read: Direction,
    write: Direction,
    either: Busy,
}

impl Totals {
    fn of(&mut self, kind: OpKind) -> &mut Direction {
        match kind {
            OpKind::Read => &mut self.read,
            OpKind::Write => &mut self.write,
        }
    }
}

/// Counts what passes through a queue. Transfers are large, so one lock per event costs nothing.
#[derive(Debug, Default)]
pub(super) struct Meter {
    totals: Mutex<Totals>,
    recorder: Recorder,
}

impl Meter {
    /// One whose transfers `recorder` records, too.
    pub(super) fn new(recorder: Recorder) -> Self {
        Self {
            totals: Mutex::default(),
            recorder,
        }
    }

    /// What records transfers one by one, while it is on.
    pub(super) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// An operation was accepted.
    pub(super) fn begin(&self, kind: OpKind) {
        let now = Instant::now();
        let mut totals = self.lock();
        totals.either.begin(now);
        totals.of(kind).busy.begin(now);
    }

    /// An operation is about to be answered, after `bytes` bytes.
    pub(super) fn end(&self, kind: OpKind, bytes: usize, failed: bool) {
        let now = Instant::now();
        let mut totals = self.lock();
        totals.either.end(now);
        let direction = totals.of(kind);
        direction.busy.end(now);
        direction.bytes += bytes as u64;
        direction.operations += 1;
        direction.failed += u64::from(failed);
    }

    /// The totals as of now.
    pub(super) fn read(&self) -> IoCounters {
        let now = Instant::now();
        let totals = self.lock();
        IoCounters {
            read: totals.read.at(now),
            write: totals.write.at(now),
            busy: totals.either.until(now),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Totals> {
        // The totals are plain numbers: a panic elsewhere cannot leave them half changed.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_is_the_union_of_overlapping_operations() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut busy = Busy::default();
        busy.begin(at(0));
        busy.begin(at(5));
        busy.end(at(10));
        assert_eq!(busy.until(at(15)), Duration::from_millis(15));
        busy.end(at(20));
        busy.begin(at(100));
        busy.end(at(101));
        assert_eq!(busy.until(at(500)), Duration::from_millis(21));
    }
}

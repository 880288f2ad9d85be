//! Byte budgets: who may use how much, who uses how much, and the peak of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::MemoryError;

/// What a byte is used for. Every payload byte is in exactly one bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Bucket {
    /// Weights that have their home in host memory.
    Weights,
    /// Gradients that wait for the optimizer step.
    Gradients,
    /// Optimizer state that has its home in host memory.
    Optimizer,
    /// The ring through which all disk traffic passes.
    Staging,
    /// Frames for gathered units.
    Gathered,
    /// What is recorded of a step, while somebody asks for it.
    Recorder,
}

impl Bucket {
    /// Every bucket, in the order reports list them.
    pub const ALL: [Self; 6] = [
        Self::Weights,
        Self::Gradients,
        Self::Optimizer,
        Self::Staging,
        Self::Gathered,
        Self::Recorder,
    ];

    /// The name used in reports and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Staging => "staging",
            Self::Gathered => "gathered",
            Self::Recorder => "recorder",
        }
    }
}

/// Bytes in use now, and the most that ever were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Bytes in use.
    pub current: u64,
    /// The highest value `current` has had.
    pub peak: u64,
}

/// A shared byte budget. Clones count in the same books.
///
/// The sum over all buckets never exceeds the limit, whatever the number of threads. A bucket and the
/// total are counted one after the other: while another thread is reserving, their sums may differ by
/// what it reserves.
#[derive(Clone, Debug)]
pub struct Budget {
    books: Arc<Books>,
}

// Counters only, and no lock: a reservation may be dropped in a forked child.
#[derive(Debug)]
struct Books {
    limit: Option<u64>,
    total: Counter,
    buckets: [Counter; Bucket::ALL.len()],
}

#[derive(Debug, Default)]
struct Counter {
    current: AtomicU64,
    peak: AtomicU64,
}

impl Counter {
    fn usage(&self) -> Usage {
        // `current` first: the peak read after it can only be higher.
        let current = self.current.load(Ordering::SeqCst);
        Usage {
            current,
            peak: self.peak.load(Ordering::SeqCst).max(current),
        }
    }

    fn take(&self, bytes: u64, limit: u64) -> Result<(), u64> {
        let before = self
            .current
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
                used.checked_add(bytes).filter(|&after| after <= limit)
            })?;
        self.peak.fetch_max(before + bytes, Ordering::SeqCst);
        Ok(())
    }

    fn give(&self, bytes: u64) {
        self.current.fetch_sub(bytes, Ordering::SeqCst);
    }
}

impl Budget {
    /// A budget of `limit` bytes over all buckets, or one that only counts.
    pub fn new(limit: Option<u64>) -> Self {
        let books = Books {
            limit,
            total: Counter::default(),
            buckets: Default::default(),
        };
        Self {
            books: Arc::new(books),
        }
    }

    /// The limit over all buckets, in bytes.
    pub fn limit(&self) -> Option<u64> {
        self.books.limit
    }

    /// Counts `bytes` in `bucket` until the reservation is dropped.
    ///
    /// # Errors
    /// [`MemoryError::OverBudget`] when the total would exceed the limit; nothing is counted then.
    pub fn reserve(&self, bucket: Bucket, bytes: u64) -> Result<Reservation, MemoryError> {
        let limit = self.books.limit.unwrap_or(u64::MAX);
        self.books
            .total
            .take(bytes, limit)
            .map_err(|used| MemoryError::OverBudget {
                bucket,
                need: bytes,
                used,
                limit,
            })?;
        // A bucket never holds more than the total, so this cannot overflow.
        let counted = self.books.buckets[bucket as usize].take(bytes, u64::MAX);
        debug_assert!(counted.is_ok(), "a bucket exceeded the total");
        Ok(Reservation {
            books: Arc::clone(&self.books),
            bucket,
            bytes,
        })
    }

    /// Bytes of one bucket.
    pub fn usage(&self, bucket: Bucket) -> Usage {
        self.books.buckets[bucket as usize].usage()
    }

    /// Bytes of all buckets together. The peak is that of the sum, not the sum of the buckets' peaks.
    pub fn total(&self) -> Usage {
        self.books.total.usage()
    }
}

/// Bytes counted in a budget; dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a reservation gives its bytes back"]
pub struct Reservation {
    books: Arc<Books>,
    bucket: Bucket,
    bytes: u64,
}

impl Reservation {
    /// Bytes reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where they are counted.
    pub fn bucket(&self) -> Bucket {
        self.bucket
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.books.buckets[self.bucket as usize].give(self.bytes);
        self.books.total.give(self.bytes);
    }
}

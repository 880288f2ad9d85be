//! What a process did and when: events in a ring of fixed size, recorded while somebody asked for it.
//!
//! Nobody ever waits for the recorder. While it is off, an operation costs one relaxed load at its beginning and one
//! comparison at its end. While it is on, an event takes the next slot of the ring; where the slot cannot be had at once
//! (another thread is writing to it, or the ring is just being put up or taken down), the event is counted as left out.

use std::cmp::Reverse;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::moment::{monotonic_ns, thread_id};
use crate::{Bucket, Budget, MemoryError, Reservation};

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Activity {
    /// The disk had a read, from when it was accepted to its answer.
    Read,
    /// The disk had a write, from when it was accepted to its answer.
    Write,
    /// The CPU updated a tile.
    Update,
    /// A thread stood still for the disk.
    DiskWait,
    /// A thread stood still for another rank.
    RankWait,
    /// A unit's weights were made readable, waits included.
    Gather,
    /// A gradient was copied or added into its unit's buffer, waits included.
    Accumulate,
    /// A unit's gradients were summed over the ranks, waits included.
    Reduce,
}

impl Activity {
    /// Every activity, each at the number that it has as an integer.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Update,
        Self::DiskWait,
        Self::RankWait,
        Self::Gather,
        Self::Accumulate,
        Self::Reduce,
    ];

    /// The name used in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Update => "update",
            Self::DiskWait => "disk wait",
            Self::RankWait => "rank wait",
            Self::Gather => "gather",
            Self::Accumulate => "accumulate",
            Self::Reduce => "reduce",
        }
    }
}

/// One thing that was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// What it was.
    pub activity: Activity,
    /// Nanoseconds of `CLOCK_MONOTONIC` at its beginning.
    pub begin: u64,
    /// Nanoseconds of `CLOCK_MONOTONIC` at its end.
    pub end: u64,
    /// Bytes that it moved or worked on.
    pub bytes: u64,
    /// The unit that it was done for, where there is one.
    pub unit: Option<u32>,
    /// The system's number of the thread that ended it.
    pub thread: u32,
}

/// The beginning of something, noted while recording was on.
#[derive(Clone, Copy, Debug)]
#[must_use = "an event is recorded when its end is noted"]
pub struct Begun(Option<u64>);

/// Records what is done. Clones record into the same ring; a new one is off.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Inner>);

#[derive(Default)]
struct Inner {
    on: AtomicBool,
    ring: RwLock<Option<Ring>>,
}

struct Ring {
    slots: Box<[Mutex<Option<Event>>]>,
    /// Events that have asked for a slot. The next one's is this number, around the ring.
    next: AtomicU64,
    _reservation: Reservation,
}

/// What was recorded from a start to the next stop; its memory is counted until it is dropped.
pub struct Recording(Ring);

impl Recorder {
    /// Begins to record the newest `events` events, in memory that is reserved in [`Bucket::Recorder`]. What began
    /// before is not recorded. What an earlier start has recorded is forgotten.
    ///
    /// # Errors
    /// [`MemoryError::OverBudget`] where there is no room; whatever is on goes on then.
    pub fn start(&self, budget: &Budget, events: usize) -> Result<(), MemoryError> {
        let count = events.max(1);
        let bytes = count.saturating_mul(size_of::<Mutex<Option<Event>>>()) as u64;
        let reservation = budget.reserve(Bucket::Recorder, bytes)?;
        let ring = Ring {
            slots: (0..count).map(|_| Mutex::new(None)).collect(),
            next: AtomicU64::new(0),
            _reservation: reservation,
        };
        let before = self.exchange(Some(ring));
        self.0.on.store(true, Ordering::Relaxed);
        drop(before);
        Ok(())
    }

    /// Ends recording; `None` where it was off.
    pub fn stop(&self) -> Option<Recording> {
        self.0.on.store(false, Ordering::Relaxed);
        self.exchange(None).map(Recording)
    }

    /// Something begins on this thread.
    #[inline]
    pub fn begin(&self) -> Begun {
        Begun(self.0.on.load(Ordering::Relaxed).then(monotonic_ns))
    }

    /// It ended just now, on this thread or another.
    #[inline]
    pub fn end(&self, begun: Begun, activity: Activity, unit: Option<usize>, bytes: u64) {
        if let Begun(Some(begin)) = begun {
            self.record(begin, activity, unit, bytes);
        }
    }

    #[cold]
    fn record(&self, begin: u64, activity: Activity, unit: Option<usize>, bytes: u64) {
        let event = Event {
            activity,
            begin,
            end: monotonic_ns(),
            bytes,
            unit: unit.and_then(|unit| u32::try_from(unit).ok()),
            thread: thread_id(),
        };
        // Who puts up or takes down the ring holds the lock for an exchange of two words: not worth a wait.
        let Ok(kept) = self.0.ring.try_read() else {
            return;
        };
        let Some(ring) = kept.as_ref() else {
            return;
        };
        let number = ring.next.fetch_add(1, Ordering::Relaxed);
        let at = usize::try_from(number % ring.slots.len() as u64).unwrap_or(0);
        if let Ok(mut slot) = ring.slots[at].try_lock() {
            *slot = Some(event);
        }
    }

    fn exchange(&self, ring: Option<Ring>) -> Option<Ring> {
        // Nothing panics under the lock.
        let mut kept = self.0.ring.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *kept, ring)
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder")
            .field("on", &self.0.on.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Recording {
    /// The events that the ring still has, in the order in which they began; of those that began at once, the longest
    /// first.
    pub fn events(self) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::from(self.0.slots)
            .into_iter()
            .filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
            .collect();
        events.sort_unstable_by_key(|event| (event.begin, Reverse(event.end)));
        events
    }

    /// Events that came and are not there: older than the ring is long, or without a slot at the time.
    pub fn left_out(&self) -> u64 {
        let kept = self
            .0
            .slots
            .iter()
            .filter(|slot| {
                slot.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .is_some()
            })
            .count();
        self.0.next.load(Ordering::Relaxed) - kept as u64
    }
}

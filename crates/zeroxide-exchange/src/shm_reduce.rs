//! Gradients and progress between the ranks of one host.
//!
//! A *round* of a unit is one exchange of its gradients: every rank sends once (its gradients, or word that it has
//! none),
//! then every rank reads all that was sent, then says that it has read. Rounds of one unit follow one another; those of
//! different units are independent, so ranks may send units in different orders.
//!
//! A sender's bytes lie in a slot of its segment. There are a few slots, so that memory is bounded. A rank that finds
//! none free takes the unit's own stretch at the end of the segment: memory that is only used then, and given back
//! after. Waiting for a slot instead could wait forever, when another rank sends in another order.
#![expect(
    unsafe_code,
    reason = "leases on shared memory; the protocol says whose turn it is"
)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use zeroxide_layout::{PAGE, checked_align_up_usize};
use zeroxide_memory::{Bucket, Budget, FRAME, Lease, Reservation, SharedSegment};

use crate::cancel::CancelToken;
use crate::error::{ExchangeError, Result};
use crate::futex;

/// Longest sleep before looking again whether waiting was cancelled.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Looks before the first sleep: an answer is often a few microseconds away.
const SPINS: u32 = 200;
/// Of a `sent` word: this many low bits say where the bytes are, the others which round it was.
const PLACE_BITS: u32 = 16;
/// Place: nothing was sent, the rank has no gradient of this unit.
const NOTHING: u64 = 0;
/// Place: the unit's own stretch. Places from 2 on are slots.
const OWN_STRETCH: u64 = 1;
const FIRST_SLOT: u64 = 2;

/// Sizes of what is exchanged. The same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReducerPlan {
    /// Bytes of each unit's gradients; 0 for units that have none.
    pub units: Vec<usize>,
    /// Slots that units share.
    pub slots: usize,
    /// Units with a slot of their own: those whose gradients come all through backward.
    pub held_through_backward: Vec<usize>,
    /// Bytes of the weights that all ranks see, in rank 0's segment.
    pub weights: usize,
}

/// How another process finds a rank's segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHandle {
    /// Process.
    pub pid: u32,
    /// Its descriptor of the segment.
    pub descriptor: i32,
}

/// Offsets in a payload.
#[derive(Debug)]
struct Places {
    slots: Vec<Range<usize>>,
    /// Slot of each unit that is held through backward.
    reserved: Vec<Option<usize>>,
    stretches: Vec<Range<usize>>,
    gradients: usize,
}

impl Places {
    fn new(plan: &ReducerPlan) -> Self {
        let largest = (0..plan.units.len())
            .filter(|unit| !plan.held_through_backward.contains(unit))
            .map(|unit| plan.units[unit])
            .max()
            .unwrap_or(0);
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end = checked_align_up_usize(start + bytes, PAGE)
                .expect("payload fits the address space");
            start..start + bytes
        };
        let mut slots: Vec<_> = (0..plan.slots).map(|_| take(largest)).collect();
        let mut reserved = vec![None; plan.units.len()];
        for &unit in &plan.held_through_backward {
            reserved[unit] = Some(slots.len());
            slots.push(take(plan.units[unit]));
        }
        let stretches = plan.units.iter().map(|bytes| take(*bytes)).collect();
        Self {
            slots,
            reserved,
            stretches,
            // Huge pages under the weights need an aligned start.
            gradients: end.next_multiple_of(FRAME),
        }
    }
}

/// What this rank does with the room for one unit.
#[derive(Debug)]
enum Outgoing {
    /// Nothing.
    Idle,
    /// Leased to whoever fills it.
    Filling { place: u64 },
    /// Sent; others may be reading.
    Sent { place: u64, bytes: Option<Lease> },
}

/// One rank's end of the exchange.
#[derive(Debug)]
pub struct SharedMemoryReducer {
    rank: usize,
    world: usize,
    plan: ReducerPlan,
    places: Places,
    segments: Vec<Arc<SharedSegment>>,
    outgoing: Vec<Outgoing>,
    /// Number of the round that each unit is in, from 1.
    rounds: Vec<u64>,
    cancel_token: Arc<CancelToken>,
    budget: Budget,
    _slots: Option<Reservation>,
    /// What each unit's own stretch takes, while it is used.
    stretches: Vec<Option<Reservation>>,
}

impl SharedMemoryReducer {
    /// Makes this rank's segment. The other ranks find it through [`segment_handle`](Self::segment_handle); nothing
    /// else may be called
    /// before [`join`](Self::join). `budget` counts the slots for as long as the reducer exists, and a unit's own
    /// stretch
    /// while it is used; the weights are the caller's to count.
    ///
    /// # Errors
    /// [`ExchangeError::Memory`].
    pub fn new(
        rank: usize,
        world: usize,
        plan: ReducerPlan,
        budget: &Budget,
        cancel_token: Arc<CancelToken>,
    ) -> Result<Self> {
        let places = Places::new(&plan);
        let counted = match places.slots.last() {
            None => None,
            Some(last) => Some(budget.reserve(Bucket::Gradients, last.end as u64)?),
        };
        let words = words(&plan);
        let payload = places.gradients + if rank == 0 { plan.weights } else { 0 };
        let segment = Arc::new(SharedSegment::create(words, payload.max(PAGE))?);
        let units = plan.units.len();
        Ok(Self {
            rank,
            world,
            places,
            segments: vec![segment],
            outgoing: (0..units).map(|_| Outgoing::Idle).collect(),
            rounds: vec![1; units],
            plan,
            cancel_token,
            budget: budget.clone(),
            _slots: counted,
            stretches: (0..units).map(|_| None).collect(),
        })
    }

    /// Where the others find this rank's segment.
    pub fn segment_handle(&self) -> SegmentHandle {
        SegmentHandle {
            pid: std::process::id(),
            descriptor: self.segments[0].descriptor(),
        }
    }

    /// Opens the segments of all ranks, whose handles come in rank order.
    ///
    /// # Errors
    /// [`ExchangeError::Memory`] when one cannot be reached, [`ExchangeError::Misuse`] for another number of handles.
    pub fn join(&mut self, handles: &[SegmentHandle]) -> Result<()> {
        if handles.len() != self.world || self.segments.len() != 1 {
            return Err(ExchangeError::Misuse {
                call: "join",
                what: format!("{} handles for a world of {}", handles.len(), self.world),
            });
        }
        let own = self.segments.remove(0);
        let words = words(&self.plan);
        for (rank, segment_handle) in handles.iter().enumerate() {
            if rank == self.rank {
                self.segments.push(Arc::clone(&own));
                continue;
            }
            let payload = self.places.gradients + if rank == 0 { self.plan.weights } else { 0 };
            let opened = SharedSegment::open(
                segment_handle.pid,
                segment_handle.descriptor,
                words,
                payload.max(PAGE),
            )?;
            self.segments.push(Arc::new(opened));
        }
        Ok(())
    }

    /// The segment that holds the weights, and the offset at which they start.
    pub fn weights(&self) -> (&SharedSegment, usize) {
        (&self.segments[0], self.places.gradients)
    }

    /// Which round the unit is in.
    pub fn round(&self, unit: usize) -> u64 {
        self.rounds[unit]
    }

    /// Room for the unit's gradients of this round, bytes undefined. Waits until all ranks have read those of the last
    /// round.
    ///
    /// # Errors
    /// [`ExchangeError::Misuse`] when the unit's room is already given out or sent, [`ExchangeError::Stopped`],
    /// [`ExchangeError::Memory`] when no slot is free and the budget has nothing left for the unit's own stretch.
    pub fn room(&mut self, unit: usize) -> Result<Lease> {
        self.await_last_round(unit)?;
        if !matches!(self.outgoing[unit], Outgoing::Idle) {
            return Err(ExchangeError::Misuse {
                call: "room",
                what: format!(
                    "unit {unit} is being filled or was sent in round {}",
                    self.rounds[unit]
                ),
            });
        }
        let taken: Vec<u64> = self
            .outgoing
            .iter()
            .filter_map(|outgoing| match outgoing {
                Outgoing::Idle => None,
                Outgoing::Filling { place } | Outgoing::Sent { place, .. } => Some(*place),
            })
            .collect();
        let place = match self.places.reserved[unit] {
            Some(slot) => FIRST_SLOT + slot as u64,
            None => (0..self.plan.slots)
                .map(|slot| FIRST_SLOT + slot as u64)
                .find(|place| !taken.contains(place))
                .unwrap_or(OWN_STRETCH),
        };
        let range = self.range(unit, place);
        if place == OWN_STRETCH {
            let bytes = range.len() as u64;
            self.stretches[unit] = Some(self.budget.reserve(Bucket::Gradients, bytes)?);
        }
        self.outgoing[unit] = Outgoing::Filling { place };
        // SAFETY: a place is given out again only after every rank has said that it has read what was there
        // (`reclaim`),
        // and no rank writes another's segment.
        Ok(unsafe { self.segments[self.rank].lease(range) })
    }

    /// Sends what was filled into the unit's room, or word that there is nothing. Waits as [`room`](Self::room) does.
    ///
    /// # Errors
    /// [`ExchangeError::Misuse`] when this round was already sent, [`ExchangeError::Stopped`].
    pub fn send(&mut self, unit: usize, bytes: Option<Lease>) -> Result<()> {
        self.await_last_round(unit)?;
        let place = match (&self.outgoing[unit], &bytes) {
            (Outgoing::Filling { place }, Some(_)) => *place,
            (Outgoing::Idle, None) => NOTHING,
            _ => {
                return Err(ExchangeError::Misuse {
                    call: "send",
                    what: format!(
                        "unit {unit} was already sent in round {}",
                        self.rounds[unit]
                    ),
                });
            }
        };
        let word = (self.rounds[unit] << PLACE_BITS) | place;
        self.outgoing[unit] = Outgoing::Sent { place, bytes };
        // Release: whoever sees the word sees the bytes.
        self.segments[self.rank]
            .word(self.sent(unit))
            .store(word, Ordering::Release);
        self.ring_others();
        Ok(())
    }

    /// Whether this rank has sent the unit in its present round.
    pub fn is_sent(&self, unit: usize) -> bool {
        // A round ends for this rank with `taken`; a lease kept for the others is of the round before.
        let word = self.segments[self.rank]
            .word(self.sent(unit))
            .load(Ordering::Relaxed);
        word >> PLACE_BITS == self.rounds[unit]
    }

    /// Whether every rank has sent the unit's present round.
    pub fn is_ready(&self, unit: usize) -> bool {
        self.segments.iter().all(|segment| {
            segment.word(self.sent(unit)).load(Ordering::Acquire) >> PLACE_BITS == self.rounds[unit]
        })
    }

    /// Calls `read` with `range` (bytes of the unit) of what every rank has sent, in rank order, `None` for nothing;
    /// then
    /// says that this rank has read, which ends the unit's round for it.
    ///
    /// # Errors
    /// [`ExchangeError::Misuse`] before [`is_ready`](Self::is_ready), and whatever `read` returns.
    pub fn take<T, E: From<ExchangeError>>(
        &mut self,
        unit: usize,
        range: Range<usize>,
        read: impl FnOnce(&[Option<&[u8]>]) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        if !self.is_ready(unit) {
            return Err(ExchangeError::Misuse {
                call: "take",
                what: format!("not every rank has sent unit {unit}"),
            }
            .into());
        }
        let leases: Vec<Option<Lease>> = (0..self.world)
            .map(|rank| self.received(rank, unit, &range))
            .collect();
        let bytes: Vec<Option<&[u8]>> = (0..self.world)
            .map(|rank| match (&self.outgoing[unit], rank == self.rank) {
                (Outgoing::Sent { bytes, .. }, true) => {
                    bytes.as_ref().map(|lease| &lease[range.clone()])
                }
                _ => leases[rank].as_deref(),
            })
            .collect();
        let outcome = read(&bytes)?;
        drop(bytes);
        drop(leases);
        self.segments[self.rank]
            .word(self.taken(unit))
            .store(self.rounds[unit], Ordering::Release);
        self.rounds[unit] += 1;
        self.ring_others();
        self.reclaim()?;
        Ok(outcome)
    }

    /// What another rank has sent of the unit.
    fn received(&self, rank: usize, unit: usize, range: &Range<usize>) -> Option<Lease> {
        if rank == self.rank {
            return None;
        }
        let segment = &self.segments[rank];
        let place = segment.word(self.sent(unit)).load(Ordering::Acquire) & ((1 << PLACE_BITS) - 1);
        if place == NOTHING {
            return None;
        }
        let whole = self.range(unit, place);
        // SAFETY: the sender does not touch the place until this rank says that it has read it, and in this process the
        // lease is the only one on it.
        Some(unsafe { segment.lease(whole.start + range.start..whole.start + range.end) })
    }

    /// A rank that is ahead waits here for those that still read what it sent of the unit.
    fn await_last_round(&mut self, unit: usize) -> Result<()> {
        if matches!(self.outgoing[unit], Outgoing::Sent { .. }) && !self.is_sent(unit) {
            let round = self.rounds[unit] - 1;
            self.wait(|reducer| reducer.is_taken(unit, round))?;
        }
        self.reclaim()
    }

    /// Whether all ranks have read the unit's round `round`.
    fn is_taken(&self, unit: usize, round: u64) -> bool {
        self.segments
            .iter()
            .all(|segment| segment.word(self.taken(unit)).load(Ordering::Acquire) >= round)
    }

    /// Takes back the room of everything that all ranks have read.
    fn reclaim(&mut self) -> Result<()> {
        for unit in 0..self.outgoing.len() {
            let Outgoing::Sent { place, .. } = self.outgoing[unit] else {
                continue;
            };
            let sent = self.segments[self.rank]
                .word(self.sent(unit))
                .load(Ordering::Relaxed)
                >> PLACE_BITS;
            if !self.is_taken(unit, sent) {
                continue;
            }
            self.outgoing[unit] = Outgoing::Idle;
            if place == OWN_STRETCH {
                // SAFETY: every rank has read it, and the lease went with the line above.
                unsafe { self.segments[self.rank].discard(self.range(unit, place)) }?;
                self.stretches[unit] = None;
            }
        }
        Ok(())
    }

    /// Says that this rank's part of the unit's weights is that of step `version`.
    pub fn set_version(&self, unit: usize, version: u64) {
        self.segments[self.rank]
            .word(Self::version(unit))
            .store(version, Ordering::Release);
        self.ring_others();
    }

    /// Whether every rank's part of the unit's weights is at least that of step `version`.
    pub fn has_version(&self, unit: usize, version: u64) -> bool {
        self.segments
            .iter()
            .all(|segment| segment.word(Self::version(unit)).load(Ordering::Acquire) >= version)
    }

    /// Sleeps until `ready` says so. Others ring whenever they have said something.
    ///
    /// # Errors
    /// [`ExchangeError::Stopped`].
    pub fn wait(&self, ready: impl Fn(&Self) -> bool) -> Result<()> {
        let word = self.segments[self.rank].futex(0);
        let mut looks = 0;
        loop {
            let seen = word.load(Ordering::Acquire);
            if ready(self) {
                return Ok(());
            }
            if looks < SPINS {
                looks += 1;
                std::hint::spin_loop();
                continue;
            }
            self.cancel_token.check()?;
            futex::wait(word, seen, LOOK_AGAIN);
        }
    }

    fn ring_others(&self) {
        for (rank, segment) in self.segments.iter().enumerate() {
            if rank != self.rank {
                futex::wake(segment.futex(0));
            }
        }
    }

    fn range(&self, unit: usize, place: u64) -> Range<usize> {
        let bytes = self.plan.units[unit];
        let start = match place {
            OWN_STRETCH => self.places.stretches[unit].start,
            slot => {
                let slot = usize::try_from(slot - FIRST_SLOT).expect("places have 16 bits");
                self.places.slots[slot].start
            }
        };
        start..start + bytes
    }

    fn version(unit: usize) -> usize {
        1 + unit
    }

    fn sent(&self, unit: usize) -> usize {
        1 + self.plan.units.len() + unit
    }

    fn taken(&self, unit: usize) -> usize {
        1 + 2 * self.plan.units.len() + unit
    }
}

/// Words of a segment: the futex, then for each unit its version, what was sent, and what was read.
fn words(plan: &ReducerPlan) -> usize {
    1 + 3 * plan.units.len()
}

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

use zeroxide_layout::{PAGE, checked_align_up_usize};
use zeroxide_memory::{Bucket, Budget, FRAME, Lease, Reservation, SharedSegment};

use crate::cancel::CancelToken;
use crate::error::{ExchangeError, Result};
use crate::peers::{PLACE_BITS, PeerWait, Peers, Until, words};
use crate::word;

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
    /// Bytes of the weights that all ranks of a shard group see, in the segment of the group's first rank.
    pub weights: usize,
    /// Ranks in a row that are one shard group; divides the number of ranks.
    pub shards: usize,
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

    /// Bytes of a rank's segment.
    fn payload(&self, plan: &ReducerPlan, rank: usize) -> usize {
        let holds_weights = rank.is_multiple_of(plan.shards);
        (self.gradients + if holds_weights { plan.weights } else { 0 }).max(PAGE)
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
    peers: Arc<Peers>,
    outgoing: Vec<Outgoing>,
    /// Number of the round that each unit is in, from 1.
    rounds: Vec<u64>,
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
        let words = words(plan.units.len());
        let payload = places.payload(&plan, rank);
        let segment = Arc::new(SharedSegment::create(words, payload)?);
        let units = plan.units.len();
        Ok(Self {
            rank,
            world,
            places,
            peers: Arc::new(Peers {
                rank,
                shards: plan.shards,
                units,
                segments: vec![segment],
                cancel_token,
            }),
            outgoing: (0..units).map(|_| Outgoing::Idle).collect(),
            rounds: vec![1; units],
            plan,
            budget: budget.clone(),
            _slots: counted,
            stretches: (0..units).map(|_| None).collect(),
        })
    }

    /// Where the others find this rank's segment.
    pub fn segment_handle(&self) -> SegmentHandle {
        SegmentHandle {
            pid: std::process::id(),
            descriptor: self.peers.own().descriptor(),
        }
    }

    /// Opens the segments of all ranks, whose handles come in rank order.
    ///
    /// # Errors
    /// [`ExchangeError::Memory`] when one cannot be reached, [`ExchangeError::Misuse`] for another number of handles.
    pub fn join(&mut self, handles: &[SegmentHandle]) -> Result<()> {
        if handles.len() != self.world || self.peers.segments.len() != 1 {
            return Err(ExchangeError::Misuse {
                call: "join",
                what: format!("{} handles for a world of {}", handles.len(), self.world),
            });
        }
        let words = words(self.plan.units.len());
        let mut segments = Vec::with_capacity(self.world);
        for (rank, segment_handle) in handles.iter().enumerate() {
            if rank == self.rank {
                segments.push(Arc::clone(&self.peers.segments[0]));
                continue;
            }
            let payload = self.places.payload(&self.plan, rank);
            let opened = SharedSegment::open(
                segment_handle.pid,
                segment_handle.descriptor,
                words,
                payload,
            )?;
            segments.push(Arc::new(opened));
        }
        self.peers = Arc::new(Peers {
            rank: self.rank,
            shards: self.plan.shards,
            units: self.plan.units.len(),
            segments,
            cancel_token: Arc::clone(&self.peers.cancel_token),
        });
        Ok(())
    }

    /// The segment that holds the weights of this rank's shard group, and the offset at which they start.
    pub fn weights(&self) -> (&SharedSegment, usize) {
        (
            &self.peers.segments[self.peers.group().start],
            self.places.gradients,
        )
    }

    /// Which round the unit is in.
    pub fn round(&self, unit: usize) -> u64 {
        self.rounds[unit]
    }

    /// What [`room`](Self::room) and [`send`](Self::send) of the unit need first: that all ranks have read what this one
    /// sent of it in the last round. `None` where they have.
    pub fn before_filling(&self, unit: usize) -> Option<PeerWait> {
        if !matches!(self.outgoing[unit], Outgoing::Sent { .. }) || self.is_sent(unit) {
            return None;
        }
        let round = self.rounds[unit] - 1;
        PeerWait::unless_over(&self.peers, Until::Taken { unit, round })
    }

    /// What [`take`](Self::take) of the unit needs first: that every rank has sent it. `None` where all have.
    pub fn before_taking(&self, unit: usize) -> Option<PeerWait> {
        let round = self.rounds[unit];
        PeerWait::unless_over(&self.peers, Until::Sent { unit, round })
    }

    /// What a reader of the unit's shared weights needs first: that every rank's part is at least that of step `version`.
    /// `None` where it is.
    pub fn before_reading(&self, unit: usize, version: u64) -> Option<PeerWait> {
        PeerWait::unless_over(&self.peers, Until::Version { unit, version })
    }

    /// Room for the unit's gradients of this round, bytes undefined.
    ///
    /// # Errors
    /// [`ExchangeError::Misuse`] when the unit's room is already given out or sent, or while other ranks still read the
    /// last round (see [`before_filling`](Self::before_filling)); [`ExchangeError::Memory`] when no slot is free and the budget has nothing left for the unit's own stretch.
    pub fn room(&mut self, unit: usize) -> Result<Lease> {
        self.reclaim()?;
        if !matches!(self.outgoing[unit], Outgoing::Idle) {
            return Err(ExchangeError::Misuse {
                call: "room",
                what: format!(
                    "unit {unit} is being filled, was sent in round {}, or is read by ranks in the one before",
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
        Ok(unsafe { self.peers.own().lease(range) })
    }

    /// Sends what was filled into the unit's room, or word that there is nothing.
    ///
    /// # Errors
    /// [`ExchangeError::Misuse`] when this round was already sent, or while other ranks still read the last one (see
    /// [`before_filling`](Self::before_filling)).
    pub fn send(&mut self, unit: usize, bytes: Option<Lease>) -> Result<()> {
        self.reclaim()?;
        let place = match (&self.outgoing[unit], &bytes) {
            (Outgoing::Filling { place }, Some(_)) => *place,
            (Outgoing::Idle, None) => NOTHING,
            _ => {
                return Err(ExchangeError::Misuse {
                    call: "send",
                    what: format!(
                        "unit {unit} was already sent in round {}, or is read by ranks in the one before",
                        self.rounds[unit]
                    ),
                });
            }
        };
        let sent = (self.rounds[unit] << PLACE_BITS) | place;
        self.outgoing[unit] = Outgoing::Sent { place, bytes };
        word::say(self.peers.own().word(self.peers.sent(unit)), sent);
        self.peers.wake_others();
        Ok(())
    }

    /// Whether this rank has sent the unit in its present round.
    pub fn is_sent(&self, unit: usize) -> bool {
        // A round ends for this rank with `taken`; a lease kept for the others is of the round before.
        let sent = word::own(self.peers.own().word(self.peers.sent(unit)));
        sent >> PLACE_BITS == self.rounds[unit]
    }

    /// Whether every rank has sent the unit's present round.
    pub fn is_ready(&self, unit: usize) -> bool {
        self.peers.have_sent(unit, self.rounds[unit])
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
        let taken = self.peers.own().word(self.peers.taken(unit));
        word::say(taken, self.rounds[unit]);
        self.rounds[unit] += 1;
        self.peers.wake_others();
        self.reclaim()?;
        Ok(outcome)
    }

    /// What another rank has sent of the unit.
    fn received(&self, rank: usize, unit: usize, range: &Range<usize>) -> Option<Lease> {
        if rank == self.rank {
            return None;
        }
        let segment = &self.peers.segments[rank];
        let place = word::read(segment.word(self.peers.sent(unit))) & ((1 << PLACE_BITS) - 1);
        if place == NOTHING {
            return None;
        }
        let whole = self.range(unit, place);
        // SAFETY: the sender does not touch the place until this rank says that it has read it, and in this process the
        // lease is the only one on it.
        Some(unsafe { segment.lease(whole.start + range.start..whole.start + range.end) })
    }

    /// Takes back the room of everything that all ranks have read.
    fn reclaim(&mut self) -> Result<()> {
        for unit in 0..self.outgoing.len() {
            let Outgoing::Sent { place, .. } = self.outgoing[unit] else {
                continue;
            };
            let sent = word::own(self.peers.own().word(self.peers.sent(unit))) >> PLACE_BITS;
            if !self.peers.have_taken(unit, sent) {
                continue;
            }
            self.outgoing[unit] = Outgoing::Idle;
            if place == OWN_STRETCH {
                // SAFETY: every rank has read it, and the lease went with the line above.
                unsafe { self.peers.own().discard(self.range(unit, place)) }?;
                self.stretches[unit] = None;
            }
        }
        Ok(())
    }

    /// Says that this rank's part of the unit's weights is that of step `version`.
    pub fn set_version(&self, unit: usize, version: u64) {
        word::say(self.peers.own().word(Peers::version(unit)), version);
        self.peers.wake_others();
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
}

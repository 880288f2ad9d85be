//! What all ranks have said in their words, and sleeping until they have said more.
//!
//! A wait holds nothing but the segments: whoever waits has given up the reducer, and with it every lock that another
//! thread of the process may need meanwhile.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use zeroxide_memory::SharedSegment;

use crate::cancel::CancelToken;
use crate::error::Result;
use crate::{futex, word};

/// Longest sleep before looking again whether waiting was cancelled.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Of a `sent` word: this many low bits say where the bytes are, the others which round it was.
pub(crate) const PLACE_BITS: u32 = 16;

/// Words of a segment: the futex, then for each unit its version, what was sent, and what was read.
pub(crate) fn words(units: usize) -> usize {
    1 + 3 * units
}

/// The segments of all ranks that are known.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) rank: usize,
    /// Ranks in a row that are one shard group.
    pub(crate) shards: usize,
    pub(crate) units: usize,
    /// In rank order; only this rank's own before all have joined.
    pub(crate) segments: Vec<Arc<SharedSegment>>,
    pub(crate) cancel_token: Arc<CancelToken>,
}

impl Peers {
    /// This rank's segment.
    pub(crate) fn own(&self) -> &Arc<SharedSegment> {
        if self.segments.len() == 1 {
            &self.segments[0]
        } else {
            &self.segments[self.rank]
        }
    }

    /// The step whose weights a rank has in the unit.
    pub(crate) fn version(unit: usize) -> usize {
        1 + unit
    }

    /// Round and place of what a rank has sent of the unit.
    pub(crate) fn sent(&self, unit: usize) -> usize {
        1 + self.units + unit
    }

    /// The last round of the unit that a rank has read.
    pub(crate) fn taken(&self, unit: usize) -> usize {
        1 + 2 * self.units + unit
    }

    /// Whether every rank has sent the unit's round `round`.
    pub(crate) fn have_sent(&self, unit: usize, round: u64) -> bool {
        self.all(self.sent(unit), |sent| {
            word::read(sent) >> PLACE_BITS == round
        })
    }

    /// Whether all ranks have read the unit's round `round`.
    pub(crate) fn have_taken(&self, unit: usize, round: u64) -> bool {
        self.all(self.taken(unit), |taken| word::read(taken) >= round)
    }

    /// The ranks of this rank's shard group, which have one copy of the weights.
    pub(crate) fn group(&self) -> Range<usize> {
        let first = self.rank - self.rank % self.shards;
        first..first + self.shards
    }

    /// Whether the part of the unit's weights of every rank of the shard group is at least that of step `version`.
    pub(crate) fn have_version(&self, unit: usize, version: u64) -> bool {
        self.segments[self.group()]
            .iter()
            .all(|segment| word::read(segment.word(Self::version(unit))) >= version)
    }

    fn all(&self, word: usize, holds: impl Fn(&AtomicU64) -> bool) -> bool {
        self.segments
            .iter()
            .all(|segment| holds(segment.word(word)))
    }

    /// Wakes the ranks that wait for what this one has said.
    pub(crate) fn wake_others(&self) {
        for (rank, segment) in self.segments.iter().enumerate() {
            if rank != self.rank {
                futex::wake(segment.futex(0));
            }
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    Sent { unit: usize, round: u64 },
    Taken { unit: usize, round: u64 },
    Version { unit: usize, version: u64 },
}

/// Something that other ranks have yet to do.
#[derive(Debug)]
#[must_use = "what it stands for has not happened yet"]
pub struct PeerWait {
    pub(crate) peers: Arc<Peers>,
    pub(crate) until: Until,
}

impl PeerWait {
    /// `None` where it has happened already.
    pub(crate) fn unless_over(peers: &Arc<Peers>, until: Until) -> Option<Self> {
        (!until.holds(peers)).then(|| Self {
            peers: Arc::clone(peers),
            until,
        })
    }

    /// Sleeps until they have done it; they wake this process whenever they have said something. What was true when
    /// this returns stays true only as long as this rank does nothing about it: look again before relying on it.
    ///
    /// # Errors
    /// [`ExchangeError::Stopped`](crate::ExchangeError::Stopped) once waiting was cancelled.
    pub fn wait(&self) -> Result<()> {
        let word = self.peers.own().futex(0);
        let mut looks = 0;
        loop {
            let seen = futex::read(word);
            if self.until.holds(&self.peers) {
                return Ok(());
            }
            if looks < futex::SPINS {
                looks += 1;
                std::hint::spin_loop();
                continue;
            }
            self.peers.cancel_token.check()?;
            futex::wait(word, seen, LOOK_AGAIN);
        }
    }
}

impl Until {
    fn holds(self, peers: &Peers) -> bool {
        match self {
            Self::Sent { unit, round } => peers.have_sent(unit, round),
            Self::Taken { unit, round } => peers.have_taken(unit, round),
            Self::Version { unit, version } => peers.have_version(unit, version),
        }
    }
}

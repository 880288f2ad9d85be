//! The public face of the crate: one lock around the state, and who may wait for what.
//!
//! No call waits for another rank while it holds the lock: what other ranks have yet to do is waited for without it, and
//! looked at again with it ([`with_peers`](Offload::with_peers)). Under the lock calls wait for the disk and for worker
//! threads, which never take it. The caller holds no lock of the interpreter in any of them. A thread of this crate
//! goes on with a step between calls ([`driver`](crate::step::driver)).
//!
//! | call | takes the lock | waits for other ranks | waits for the disk |
//! |---|---|---|---|
//! | `usage`, `total_usage`, `io`, `cancel`, `bringer`, `start_recording`, `stop_recording` | no | no | no |
//! | `gather`, `gather_ahead` | yes | until every rank has updated weights that are one copy for all | until the unit is read, or frames are free |
//! | `accumulate`, `accumulate_rows`, `gradient_room` | yes | until all have read what the unit sent in the last backward | for the step's tiles of the unit |
//! | `send` | yes | as `accumulate` | no |
//! | `receive` | yes | with `wait`, until all have sent the unit | for the step under way |
//! | `step`, `finish` | yes | no | for the step under way |
//! | `prefetch`, `release`, `cover`, `beside`, `set_all_shards_valid`, `has_room` | yes | no | where pages move of which writes are in flight |
//! | `rewrite_weights`, `fill_*`, `read_*`, `write_*`, `receive_from`, `receive_sum` | yes | no | for the step under way and their own tiles |
//! | `note_gradient`, `note_norm`, `away_runs`, `gradient_arrived`, `check_usable` | yes | no | no |
//! | `prepare_commit`, `roll_back` | yes | no | for the step under way, and all that they write or read |
//! | `adopt`, `conclude_commit`, `committed_reads` | yes | no | for a few small files |
//! | `CommittedReads` | no | no | for its own tiles |
//! | `begin_early`, `begin_speculation`, `update_early`, `take_back`, `fail_early` | yes | no | for the step before, and what is in flight |
//! | `fail_step` | yes | no | for what is in flight |
//! | `watch_readers`, `set_group`, `lend`, `join`, `room`, `close` and what tells of parameters, windows and gradients | yes | no | `close` for what is in flight |
//!
//! `watch_readers` and `close` also take the lock of the fault net, whose thread takes the other one; `Bringer` has one of
//! its own, held for no longer than it takes to look at it.

mod away;
mod durable;
mod gradients;
mod recording;
mod state;
mod step;
mod weights;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use zeroxide_exchange::{CancelToken, PeerWait, SegmentHandle};
use zeroxide_layout::UnitLayout;
use zeroxide_memory::{Activity, Bucket, Budget, FaultNet, ForkGuard, Recorder, Usage};

use crate::core::Core;
use crate::error::{OffloadError, Result, misuse};
use crate::io_report::{IoReport, Traffic};
use crate::settings::{Settings, UnitSpec};
use crate::step::driver;
use crate::step::turns::Turns;
use crate::weights::bringer::Bringer;
use crate::weights::stray;

/// Units of parameters, their tiers, and the optimizer over them.
pub struct Offload {
    pub(crate) guard: ForkGuard,
    core: Arc<Mutex<Option<Core>>>,
    /// Goes on with steps that have outlived their call.
    turns: Turns,
    budget: Budget,
    recorder: Recorder,
    /// What is counted of the disk; gone once closed. Its lock is never held while anything is waited for.
    traffic: Mutex<Option<Traffic>>,
    closed: AtomicBool,
    cancel_token: Option<Arc<CancelToken>>,
    /// Whoever brings weights from other ranks to readers that nothing announced.
    pub(crate) bringer: Arc<Bringer>,
    /// Gone once closed. Behind a lock of its own: its thread takes the other one.
    pub(crate) net: Mutex<Option<FaultNet>>,
    /// Addresses of weights that come and go.
    moving: Vec<Range<usize>>,
}

impl Offload {
    /// Reserves all memory and disk space. Weights are undefined until they are filled; moments start at zero.
    pub fn new(settings: &Settings, units: &[UnitSpec]) -> Result<Self> {
        let core = Core::new(settings, units)?;
        let budget = core.budget.clone();
        let recorder = core.recorder.clone();
        let traffic = core.traffic();
        let cancel_token = core.gradients.transport.cancel_token().cloned();
        let moving = core
            .stray_ranges()
            .into_iter()
            .map(|(_, range)| range)
            .collect();
        let core = Arc::new(Mutex::new(Some(core)));
        let bringer = Arc::new(Bringer::new());
        let (net, turns) = {
            let guard = core.lock().expect("made just now");
            let made = guard.as_ref().expect("made just now");
            let shared = Arc::downgrade(&core);
            let net = stray::spread(made, Weak::clone(&shared), Arc::clone(&bringer))?;
            (net, driver::start(made, shared)?)
        };
        Ok(Self {
            turns,
            guard: ForkGuard::new(),
            cancel_token,
            core,
            budget,
            recorder,
            traffic: Mutex::new(traffic),
            closed: AtomicBool::new(false),
            bringer,
            net: Mutex::new(net),
            moving,
        })
    }

    pub(crate) fn with<T>(
        &self,
        call: &'static str,
        work: impl FnOnce(&mut Core) -> Result<T>,
    ) -> Result<T> {
        // Before the lock: a thread that held it at the fork is not there to give it back, and neither is one that
        // would report a transfer.
        self.guard.check_process()?;
        let present = self.turns.call();
        let mut guard = self.lock();
        let Some(core) = guard.as_mut() else {
            return misuse(call, "already closed");
        };
        let outcome = work(core);
        present.leaves(core.step.active.is_some());
        outcome
    }

    /// As [`with`](Self::with), for a call that other ranks may have to make possible: `before` tells what they have yet
    /// to do. That is waited for without the lock, and asked for again with it; `work` runs in the same hold of the lock
    /// in which `before` has found nothing left.
    pub(crate) fn with_peers<T>(
        &self,
        call: &'static str,
        mut before: impl FnMut(&mut Core) -> Result<Option<PeerWait>>,
        work: impl FnOnce(&mut Core) -> Result<T>,
    ) -> Result<T> {
        loop {
            self.guard.check_process()?;
            let present = self.turns.call();
            let mut guard = self.lock();
            let Some(core) = guard.as_mut() else {
                return misuse(call, "already closed");
            };
            let found = before(core);
            present.leaves(core.step.active.is_some());
            let Some(wait) = found? else {
                let outcome = work(core);
                present.leaves(core.step.active.is_some());
                return outcome;
            };
            drop(guard);
            drop(present);
            let begun = self.recorder.begin();
            let waited = wait.wait();
            self.recorder.end(begun, Activity::RankWait, None, 0);
            waited?;
        }
    }

    /// Whether the address is one of weights that come and go. Reading or writing there may need a call of another thread
    /// and must not be done under the lock.
    pub(crate) fn is_moving(&self, address: usize) -> bool {
        self.moving.iter().any(|range| range.contains(&address))
    }

    /// The values, copied if they lie among weights that come and go.
    pub(crate) fn outside<'a, T: Copy>(&self, values: &'a [T]) -> Cow<'a, [T]> {
        if self.is_moving(values.as_ptr() as usize) {
            Cow::Owned(values.to_vec())
        } else {
            Cow::Borrowed(values)
        }
    }

    /// Has `read` fill `out`, or a copy of it if it lies among weights that come and go.
    pub(crate) fn fill_outside<T: Copy>(
        &self,
        out: &mut [T],
        read: impl FnOnce(&mut [T]) -> Result<()>,
    ) -> Result<()> {
        if !self.is_moving(out.as_ptr() as usize) {
            return read(out);
        }
        let mut copy = out.to_vec();
        read(&mut copy)?;
        out.copy_from_slice(&copy);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Core>> {
        // A panic under the lock is a bug; the state may be half changed, so it is not used again.
        self.core
            .lock()
            .expect("a call panicked and left the state undefined")
    }

    /// Offset of a parameter in its unit's flat weights, in elements.
    pub fn param_offset(&self, unit: usize, param: usize) -> Result<u64> {
        self.with("param_offset", |core| {
            core.check_param("param_offset", unit, param)?;
            Ok(core.units[unit].layout.offset(param))
        })
    }

    /// Where the other ranks of this host find this one; `None` where nothing is shared.
    pub fn segment_handle(&self) -> Result<Option<SegmentHandle>> {
        self.with("segment_handle", |core| Ok(core.segment_handle()))
    }

    /// Takes up the connection to all ranks, whose handles come in rank order.
    pub fn join(&self, handles: &[SegmentHandle]) -> Result<()> {
        self.with("join", |core| core.join(handles))
    }

    /// Ends every present and later wait for another rank with an error that says `line` and blames `ranks`. Never
    /// blocks.
    pub fn cancel(&self, line: String, ranks: Vec<u32>) {
        if let Some(cancel_token) = &self.cancel_token {
            cancel_token.cancel(line, ranks);
        }
    }

    /// The elements of a unit's layout that this rank keeps at home; the other replicas of its shard keep the same.
    pub fn shard(&self, unit: usize) -> Result<(u64, u64)> {
        self.with("shard", |core| {
            core.check_unit("shard", unit)?;
            let own = core.units[unit].own();
            Ok((own.start, own.end))
        })
    }

    /// The parts of parameters in the slice of a unit that this rank saves, over all ranks each element once:
    /// (parameter, first element in it, elements).
    pub fn pieces(&self, unit: usize) -> Result<Vec<(usize, u64, u64)>> {
        self.with("pieces", |core| {
            core.check_unit("pieces", unit)?;
            let unit = &core.units[unit];
            Ok(pieces_in(
                &unit.layout,
                unit.layout.shard(unit.mesh.slice()),
            ))
        })
    }

    /// The parts of parameters in what this rank keeps of a unit at home, as [`pieces`](Self::pieces) lists them.
    pub fn kept_pieces(&self, unit: usize) -> Result<Vec<(usize, u64, u64)>> {
        self.with("kept_pieces", |core| {
            core.check_unit("kept_pieces", unit)?;
            let unit = &core.units[unit];
            Ok(pieces_in(&unit.layout, unit.own()))
        })
    }

    /// Payload bytes of a bucket. Never blocks on a running call.
    pub fn usage(&self, bucket: Bucket) -> Usage {
        self.budget.usage(bucket)
    }

    /// Payload bytes of all buckets.
    pub fn total_usage(&self) -> Usage {
        self.budget.total()
    }

    /// Traffic so far; `None` where nothing is at home on disk. Never blocks on a running call.
    pub fn io(&self) -> Result<Option<IoReport>> {
        if self.closed.load(Ordering::Acquire) {
            return misuse("io", "already closed");
        }
        let traffic = self.traffic().clone();
        Ok(traffic.as_ref().map(Traffic::report))
    }

    fn traffic(&self) -> MutexGuard<'_, Option<Traffic>> {
        self.traffic.lock().expect("no call panics under it")
    }

    /// Ends all disk traffic, removes the scratch files and gives all memory back. Idempotent. Does nothing in a
    /// forked child, where all of that belongs to the parent.
    ///
    /// `readers`: units that somebody may read later; those whose weights are not all there show NaN.
    pub fn close(&self, readers: &[usize]) -> Result<()> {
        if self.guard.is_forked() {
            return Ok(());
        }
        // First: its thread may be inside a call, or wait for somebody who would make one.
        self.bringer.close();
        self.cancel(
            "the engine was closed while this call waited for other ranks".into(),
            Vec::new(),
        );
        drop(self.net.lock().expect("no call panics under it").take());
        self.turns.end();
        let Some(mut core) = self.lock().take() else {
            return Ok(());
        };
        self.closed.store(true, Ordering::Release);
        self.traffic().take();
        // Reads in flight write into windows: they end before the windows go.
        core.abandon_step();
        let reads = core.wait_reads();
        for unit in readers {
            core.leave_to_readers(*unit)?;
        }
        core.state.cache.clear();
        if let Some(disk) = core.disk.take() {
            disk.close()?;
        }
        match reads {
            // Weights that will never be read again do not matter at the end.
            Ok(()) | Err(OffloadError::Storage(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        if self.guard.is_forked() {
            // The parts would wait for threads that are not there. The exit of the child gives their memory back.
            std::mem::forget(Arc::clone(&self.core));
            self.turns.forget();
        } else {
            self.turns.end();
            // The net's thread, which is waited for next, may itself wait for a listener that needs what the caller holds.
            self.bringer.close();
        }
    }
}

/// (parameter, first element in it, elements) of each part of a parameter in `range` of a layout.
fn pieces_in(layout: &UnitLayout, range: Range<u64>) -> Vec<(usize, u64, u64)> {
    layout
        .params_in(range)
        .map(|piece| {
            let count = piece.range.end - piece.range.start;
            (piece.param, piece.offset_in_param, count)
        })
        .collect()
}

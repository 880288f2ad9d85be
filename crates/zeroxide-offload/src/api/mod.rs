//! The public face of the crate: one lock around the state, and nothing else.

mod weights;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use zeroxide_exchange::{CancelToken, SegmentHandle};
use zeroxide_memory::{Bucket, Budget, FaultNet, ForkGuard, Usage};
use zeroxide_optim::{Grad, Optimizer};

use crate::core::Core;
use crate::error::{OffloadError, Result, misuse};
use crate::gradients::accumulate::{GradCopy, GradNorm, address_of};
use crate::io_report::IoReport;
use crate::settings::{Settings, UnitSpec};
use crate::weights::bringer::Bringer;
use crate::weights::residence::{Lent, Weights};
use crate::weights::stray;

/// Units of parameters, their tiers, and the optimizer over them.
pub struct Offload {
    pub(crate) guard: ForkGuard,
    core: Arc<Mutex<Option<Core>>>,
    budget: Budget,
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
        let cancel_token = core.transport.cancel_token().cloned();
        let moving = core
            .stray_ranges()
            .into_iter()
            .map(|(_, range)| range)
            .collect();
        let core = Arc::new(Mutex::new(Some(core)));
        let bringer = Arc::new(Bringer::new());
        let net = match core.lock().expect("made just now").as_ref() {
            Some(made) => stray::spread(made, Arc::downgrade(&core), Arc::clone(&bringer))?,
            None => None,
        };
        Ok(Self {
            guard: ForkGuard::new(),
            cancel_token,
            core,
            budget,
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
        match self.lock().as_mut() {
            Some(core) => work(core),
            None => misuse(call, "already closed"),
        }
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

    /// Puts a parameter into one of the groups that [`step`](Self::step) is given.
    pub fn set_group(&self, unit: usize, param: usize, group: usize) -> Result<()> {
        self.with("set_group", |core| {
            core.check_param("set_group", unit, param)?;
            core.units[unit].params[param].group = group;
            Ok(())
        })
    }

    /// Starts to fill the state tensor `name` of a unit: "weight", which stands for the weight with all its bits, or
    /// one
    /// of its rule's own.
    pub fn fill_begin(&self, unit: usize, name: &str) -> Result<()> {
        self.with("fill_begin", |core| core.fill_begin(unit, name))
    }

    /// Gives elements `start..` of one parameter of the unit being filled.
    pub fn fill_param(&self, unit: usize, param: usize, start: u64, values: &[f32]) -> Result<()> {
        self.with("fill_param", |core| {
            core.fill_param(unit, param, start, values)
        })
    }

    /// Gives bytes `start..` of one frozen parameter of the unit being filled, as they are.
    pub fn fill_bytes(&self, unit: usize, param: usize, start: u64, bytes: &[u8]) -> Result<()> {
        self.with("fill_bytes", |core| {
            core.fill_bytes(unit, param, start, bytes)
        })
    }

    /// Reads bytes `start..` of one frozen parameter, as they are.
    pub fn read_bytes(&self, unit: usize, param: usize, start: u64, out: &mut [u8]) -> Result<()> {
        self.with("read_bytes", |core| {
            core.read_bytes(unit, param, start, out)
        })
    }

    /// Replaces bytes `start..` of one frozen parameter where this rank keeps them; called as
    /// [`write_param`](Self::write_param) is.
    pub fn write_bytes(&self, unit: usize, param: usize, start: u64, bytes: &[u8]) -> Result<()> {
        self.with("write_bytes", |core| {
            core.write_bytes(unit, param, start, bytes)
        })
    }

    /// Writes what was filled to where it is at home.
    pub fn fill_commit(&self, unit: usize) -> Result<()> {
        self.with("fill_commit", |core| core.fill_commit(unit))
    }

    /// Reads elements `start..` of one parameter as fp32.
    pub fn read_param(
        &self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        self.with("read_param", |core| {
            core.read_param(unit, param, name, start, out)
        })
    }

    /// Writes elements `start..` of one parameter, given as fp32, where this rank keeps them; all else stays. Every
    /// rank
    /// calls it, with the whole parameter or with its own part.
    pub fn write_param(
        &self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        self.with("write_param", |core| {
            core.write_param(unit, param, name, start, values)
        })
    }

    /// Reads elements `start..` of one parameter's accumulated gradient as fp32; zero if there is none.
    pub fn read_grad(&self, unit: usize, param: usize, start: u64, out: &mut [f32]) -> Result<()> {
        self.with("read_grad", |core| core.read_grad(unit, param, start, out))
    }

    /// Replaces elements `start..` of one parameter's gradient, which it has afterwards.
    pub fn write_grad(&self, unit: usize, param: usize, start: u64, values: &[f32]) -> Result<()> {
        self.with("write_grad", |core| {
            core.write_grad(unit, param, start, values)
        })
    }

    /// Updates made so far to one parameter.
    pub fn updates(&self, unit: usize, param: usize) -> Result<u64> {
        self.with("updates", |core| core.updates(unit, param))
    }

    /// Sets the number of updates made so far to one parameter.
    pub fn set_updates(&self, unit: usize, param: usize, updates: u64) -> Result<()> {
        self.with("set_updates", |core| core.set_updates(unit, param, updates))
    }

    /// Where the other ranks of this host find this one; `None` where nothing is shared.
    pub fn segment_handle(&self) -> Result<Option<SegmentHandle>> {
        self.with("segment_handle", |core| Ok(core.segment_handle()))
    }

    /// Takes up the connection to all ranks, whose handles come in rank order.
    pub fn join(&self, handles: &[SegmentHandle]) -> Result<()> {
        self.with("join", |core| core.join(handles))
    }

    /// Ends every present and later wait for another rank with an error that says `line`. Never blocks.
    pub fn cancel(&self, line: String) {
        if let Some(cancel_token) = &self.cancel_token {
            cancel_token.cancel(line);
        }
    }

    /// Ends the unit's part of this backward: its gradients go out to the ranks that keep them.
    pub fn send(&self, unit: usize) -> Result<()> {
        self.with("send", |core| core.send(unit))
    }

    /// Whether this rank has sent the unit and not yet summed what all have sent.
    pub fn is_sent(&self, unit: usize) -> Result<bool> {
        self.with("is_sent", |core| {
            core.check_unit("is_sent", unit)?;
            Ok(core.is_sent(unit))
        })
    }

    /// Sums a unit's gradients once every rank has sent them; with `wait`, waits for that. Returns whether it did.
    pub fn receive(&self, unit: usize, wait: bool) -> Result<bool> {
        self.with("receive", |core| core.receive(unit, wait))
    }

    /// (address, bytes) of what a unit sends, where the caller carries it; valid until
    /// [`receive_from`](Self::receive_from).
    pub fn outgoing(&self, unit: usize) -> Result<(usize, usize)> {
        self.with("outgoing", |core| core.outgoing(unit))
    }

    /// (address, bytes) of where the other ranks' gradients of what this rank keeps of a unit have to come, rank after
    /// rank; valid until [`receive_from`](Self::receive_from). One unit at a time.
    pub fn incoming(&self, unit: usize) -> Result<(usize, usize)> {
        self.with("incoming", |core| core.incoming(unit))
    }

    /// Sums what has come in with this rank's own, in rank order.
    pub fn receive_from(&self, unit: usize) -> Result<()> {
        self.with("receive_from", |core| core.receive_from(unit))
    }

    /// Which trainable parameters have had a gradient since the last step.
    pub fn accumulated(&self) -> Result<Vec<bool>> {
        self.with("accumulated", |core| Ok(core.accumulated()))
    }

    /// Sets that to what holds over all ranks.
    pub fn set_accumulated(&self, accumulated: &[bool]) -> Result<()> {
        self.with("set_accumulated", |core| core.set_accumulated(accumulated))
    }

    /// The elements of a unit's layout that this rank saves, over all ranks each once.
    pub fn shard(&self, unit: usize) -> Result<(u64, u64)> {
        self.with("shard", |core| {
            core.check_unit("shard", unit)?;
            let shard = core.units[unit].layout.shard(core.mesh.rank);
            Ok((shard.start, shard.end))
        })
    }

    /// The parts of parameters in this rank's shard of a unit: (parameter, first element in it, elements).
    pub fn pieces(&self, unit: usize) -> Result<Vec<(usize, u64, u64)>> {
        self.with("pieces", |core| {
            core.check_unit("pieces", unit)?;
            let layout = &core.units[unit].layout;
            let pieces = layout.params_in(layout.shard(core.mesh.rank));
            Ok(pieces
                .map(|piece| {
                    let count = piece.range.end - piece.range.start;
                    (piece.param, piece.offset_in_param, count)
                })
                .collect())
        })
    }

    /// Takes elements `start..` of one parameter's gradient; with `norm`, also its part of the global norm. A
    /// gradient comes whole or in parts, in order.
    pub fn accumulate(
        &self,
        unit: usize,
        param: usize,
        start: u64,
        source: Grad<'_>,
        norm: bool,
    ) -> Result<()> {
        let copy = self.copy_of_weights(&source);
        let source = copy.as_ref().map_or(source, |copy| copy.grad());
        self.with("accumulate", |core| {
            core.accumulate(unit, param, start, source, norm)
        })
    }

    /// A copy of a gradient that lies in a window, made outside of the lock: reading there may need a call.
    fn copy_of_weights(&self, source: &Grad<'_>) -> Option<GradCopy> {
        let address = address_of(source);
        let inside = self.moving.iter().any(|range| range.contains(&address));
        inside.then(|| GradCopy::of(source))
    }

    /// Adds to rows of one parameter's gradient, of `count` rows in all.
    pub fn accumulate_rows(
        &self,
        unit: usize,
        param: usize,
        count: u64,
        rows: &[i64],
        source: Grad<'_>,
    ) -> Result<()> {
        let copy = self.copy_of_weights(&source);
        let source = copy.as_ref().map_or(source, |copy| copy.grad());
        self.with("accumulate_rows", |core| {
            core.accumulate_rows(unit, param, count, rows, source)
        })
    }

    /// The norm of all gradients that have been accumulated.
    pub fn grad_norm(&self) -> Result<GradNorm> {
        self.with("grad_norm", |core| Ok(core.grad_norm()))
    }

    /// Forgets all gradients that have been accumulated.
    pub fn clear_gradients(&self) -> Result<()> {
        self.with("clear_gradients", |core| {
            core.clear_gradients();
            Ok(())
        })
    }

    /// Lends weight and gradient of the only parameter of a unit until the next step ends.
    pub fn lend(&self, unit: usize, lent: Lent) -> Result<()> {
        self.with("lend", |core| {
            core.check_unit("lend", unit)?;
            let this = &mut core.units[unit];
            let numel = crate::core::to_usize(this.layout.numel(0));
            let (weight, grad) = (numel * core.compute.size(), numel * lent.grad_dtype.size());
            if this.params.len() != 1 || lent.weight.len() != weight || lent.grad.len() != grad {
                return misuse(
                    "lend",
                    format!(
                        "{}: expected one parameter of {weight} bytes and {grad} of gradient, got {} and {}",
                        this.name,
                        lent.weight.len(),
                        lent.grad.len()
                    ),
                );
            }
            let Weights::Borrowed { lent: place } = &mut this.weights else {
                return misuse("lend", format!("{} keeps its own weights", this.name));
            };
            *place = Some(lent);
            this.params[0].accumulated = true;
            Ok(())
        })
    }

    /// One update of every parameter whose gradient has been accumulated; `grad_scale` multiplies the gradients.
    ///
    /// With state at home on disk this returns while the step is under way; each later use of a unit waits until that
    /// unit is done. Errors of the rest come out there, or at [`finish`](Self::finish).
    pub fn step(&self, groups: &[Optimizer], grad_scale: f64) -> Result<()> {
        self.with("step", |core| {
            let borrows = core
                .units
                .iter()
                .any(|unit| matches!(unit.weights, Weights::Borrowed { lent: Some(_) }));
            let mut outcome = core.step_begin(groups, grad_scale);
            if borrows && outcome.is_ok() {
                outcome = core.finish_step();
            }
            for unit in &mut core.units {
                if let Weights::Borrowed { lent } = &mut unit.weights {
                    *lent = None;
                }
            }
            outcome
        })
    }

    /// Ends the step under way, if there is one.
    pub fn finish(&self) -> Result<()> {
        self.with("finish", Core::finish_step)
    }

    /// Payload bytes of a bucket. Never blocks on a running call.
    pub fn usage(&self, bucket: Bucket) -> Usage {
        self.budget.usage(bucket)
    }

    /// Payload bytes of all buckets.
    pub fn total_usage(&self) -> Usage {
        self.budget.total()
    }

    /// Traffic so far; `None` where nothing is at home on disk.
    pub fn io(&self) -> Result<Option<IoReport>> {
        self.with("io", |core| {
            Ok(core.disk.as_ref().map(|disk| IoReport {
                counters: disk.queue.counters(),
                waited: core.waited,
                updating: core.updating,
                tiles: core.tiles_updated,
                engine: disk.queue.describe(),
            }))
        })
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
        drop(self.net.lock().expect("no call panics under it").take());
        let Some(mut core) = self.lock().take() else {
            return Ok(());
        };
        // Reads in flight write into windows: they end before the windows go.
        core.abandon_step();
        let reads = core.wait_reads();
        for unit in readers {
            core.leave_to_readers(*unit)?;
        }
        core.cache.clear();
        if let Some(disk) = core.disk.take() {
            disk.queue.close();
            disk.store.close()?;
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
        }
    }
}

//! The public face, where it is about gradients: from autograd, between ranks, and their norm.

use zeroxide_memory::Activity;
use zeroxide_optim::Grad;

use crate::api::Offload;
use crate::error::Result;
use crate::gradients::accumulate::{GradCopy, GradNorm, address_of};
use crate::rooms::Room;

impl Offload {
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
        let copy = self.gradient_outside(&source);
        let source = copy.as_ref().map_or(source, |copy| copy.grad());
        self.recorded(Activity::Accumulate, unit, |bytes| {
            *bytes = bytes_of(&source);
            self.with_peers(
                "accumulate",
                |core| Ok(core.before_accumulating(unit, param)),
                |core| core.accumulate(unit, param, start, source, norm),
            )
        })
    }

    /// (address, bytes) of where the first gradient of a parameter since the last step may be put by who brings it there
    /// itself, and then calls [`gradient_arrived`](Self::gradient_arrived); `None` where it is to be accumulated. Valid
    /// until then, or until gradients are accumulated or forgotten.
    pub fn gradient_room(&self, unit: usize, param: usize) -> Result<Option<(usize, usize)>> {
        self.with_peers(
            "gradient_room",
            |core| Ok(core.before_accumulating(unit, param)),
            |core| core.gradient_room(unit, param),
        )
    }

    /// A gradient lies where [`gradient_room`](Self::gradient_room) said: takes its part of the global norm.
    pub fn gradient_arrived(&self, unit: usize, param: usize) -> Result<()> {
        self.with("gradient_arrived", |core| {
            core.gradient_arrived(unit, param)
        })
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
        let copy = self.gradient_outside(&source);
        let source = copy.as_ref().map_or(source, |copy| copy.grad());
        let rows = &*self.outside(rows);
        self.recorded(Activity::Accumulate, unit, |bytes| {
            *bytes = bytes_of(&source);
            self.with_peers(
                "accumulate_rows",
                |core| Ok(core.before_accumulating(unit, param)),
                |core| core.accumulate_rows(unit, param, count, rows, source),
            )
        })
    }

    /// Whether a parameter has had a gradient since the last step.
    pub fn has_gradient(&self, unit: usize, param: usize) -> Result<bool> {
        self.with("has_gradient", |core| {
            core.check_param("has_gradient", unit, param)?;
            Ok(core.units[unit].params[param].has_gradient())
        })
    }

    /// Reads elements `start..` of one parameter's accumulated gradient as fp32; zero if there is none.
    pub fn read_grad(&self, unit: usize, param: usize, start: u64, out: &mut [f32]) -> Result<()> {
        self.fill_outside(out, |out| {
            self.with("read_grad", |core| core.read_grad(unit, param, start, out))
        })
    }

    /// Replaces elements `start..` of one parameter's gradient, which it has afterwards.
    pub fn write_grad(&self, unit: usize, param: usize, start: u64, values: &[f32]) -> Result<()> {
        let values = &*self.outside(values);
        self.with("write_grad", |core| {
            core.write_grad(unit, param, start, values)
        })
    }

    /// Ends the unit's part of this backward: its gradients go out to the ranks that keep them.
    pub fn send(&self, unit: usize) -> Result<()> {
        self.with_peers(
            "send",
            |core| Ok(core.before_sending(unit)),
            |core| core.send(unit),
        )
    }

    /// Sums a unit's gradients once every rank has sent them; with `wait`, waits for that. Returns whether it did.
    pub fn receive(&self, unit: usize, wait: bool) -> Result<bool> {
        let mut round = None;
        self.recorded(Activity::Reduce, unit, |_| {
            self.with_peers(
                "receive",
                |core| core.before_receiving(unit, wait, &mut round),
                |core| core.receive(unit),
            )
        })
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
        self.recorded(Activity::Reduce, unit, |_| {
            self.with("receive_from", |core| core.receive_from(unit))
        })
    }

    /// Takes the sums of a unit over all ranks, where the caller sums them: of the elements that this rank sums, not yet
    /// scaled.
    pub fn receive_sum(&self, unit: usize, sums: &[f32]) -> Result<()> {
        self.recorded(Activity::Reduce, unit, |bytes| {
            *bytes = size_of_val(sums) as u64;
            self.with("receive_sum", |core| core.receive_sum(unit, sums))
        })
    }

    /// (address, bytes) of room for what travels as integers, valid until the core is closed.
    pub fn room(&self, room: Room) -> Result<(usize, usize)> {
        self.with("room", |core| core.room(room))
    }

    /// (address, bytes) of the gradients of a unit that this rank keeps, in the dtype in which they are kept, one
    /// slice for each replica. After [`receive_from`](Self::receive_from), where a rank sums its own slice alone, the
    /// caller brings the other replicas' slices there.
    pub fn kept_gradients(&self, unit: usize) -> Result<(usize, usize)> {
        self.with("kept_gradients", |core| core.kept_gradients(unit))
    }

    /// Which trainable parameters have had a gradient since the last step.
    pub fn accumulated(&self) -> Result<Vec<bool>> {
        self.with("accumulated", |core| Ok(core.accumulated()))
    }

    /// Sets that to what holds over all ranks.
    pub fn set_accumulated(&self, accumulated: &[bool]) -> Result<()> {
        self.with("set_accumulated", |core| core.set_accumulated(accumulated))
    }

    /// The norm of all gradients that have been accumulated.
    pub fn grad_norm(&self) -> Result<GradNorm> {
        self.with("grad_norm", |core| Ok(core.grad_norm()))
    }

    /// Forgets all gradients that have been accumulated.
    pub fn clear_gradients(&self) -> Result<()> {
        self.with("clear_gradients", |core| {
            core.check_between_steps("clear_gradients")?;
            core.clear_gradients();
            core.drop_gradients();
            Ok(())
        })
    }

    /// A copy of a gradient that lies in a window, made outside of the lock: reading there may need a call.
    fn gradient_outside(&self, source: &Grad<'_>) -> Option<GradCopy> {
        self.is_moving(address_of(source))
            .then(|| GradCopy::of(source))
    }
}

fn bytes_of(grad: &Grad<'_>) -> u64 {
    let bytes = match grad {
        Grad::F32(values) => size_of_val(*values),
        Grad::Bf16(values) | Grad::F16(values) => size_of_val(*values),
    };
    bytes as u64
}

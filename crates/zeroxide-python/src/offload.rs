//! `Offload` for Python. The GIL is released around every call that can take long.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use zeroxide_offload::{AwayRun, Lent, Offload, Room, SegmentHandle, UnitSpec};
use zeroxide_optim::{AccumulateStats, Optimizer};

use crate::bringer::PyBringer;
use crate::errors::map;
use crate::optimizer::Rule;
use crate::recorder::PyRecorder;
use crate::report;
use crate::settings::{PySettings, PyUnitSpec};
use crate::spec::TensorSpec;
use crate::window::PyWindow;
use crate::words::{GRADIENT, RunRow, state_name, unknown};

/// Units of parameters, their tiers, and the optimizer over them.
#[pyclass(frozen, module = "zeroxide._core", name = "Offload")]
pub(crate) struct PyOffload {
    pub(crate) inner: Arc<Offload>,
}

#[pymethods]
impl PyOffload {
    /// Reserves all memory and disk space. Raises `BudgetError`, `StorageError`, `InvalidValueError`.
    #[new]
    #[pyo3(signature = (settings, units, /))]
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn new(
        py: Python<'_>,
        settings: PyRef<'_, PySettings>,
        units: Vec<PyRef<'_, PyUnitSpec>>,
    ) -> PyResult<Self> {
        let settings = &settings.inner;
        let specs: Vec<UnitSpec> = units.iter().map(|unit| unit.inner.clone()).collect();
        let made = py.detach(|| Offload::new(settings, &specs));
        Ok(Self {
            inner: Arc::new(map(py, made)?),
        })
    }

    /// The unit's flat weights as a buffer; `None` where the weights are the caller's.
    fn window(&self, py: Python<'_>, unit: usize) -> PyResult<Option<PyWindow>> {
        let found = map(py, py.detach(|| self.inner.window(unit)))?;
        Ok(found.map(PyWindow::from))
    }

    /// Offset of a parameter in its unit's flat weights, in elements.
    fn param_offset(&self, py: Python<'_>, unit: usize, param: usize) -> PyResult<u64> {
        map(py, py.detach(|| self.inner.param_offset(unit, param)))
    }

    /// Puts a parameter into one of the groups given to `step`.
    fn set_group(&self, py: Python<'_>, unit: usize, param: usize, group: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.set_group(unit, param, group)))
    }

    /// Steps leave parameters of the unit alone that have no gradient, and its next use makes up for it.
    fn set_lazy(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.set_lazy(unit)))
    }

    /// Starts to fill "weights" (all their bits) or a state tensor of the unit's rule; what is not filled becomes zero.
    fn fill_begin(&self, py: Python<'_>, unit: usize, part: &str) -> PyResult<()> {
        let name = state_name(part);
        map(py, py.detach(|| self.inner.fill_begin(unit, name)))
    }

    /// Gives elements `start..` of one parameter of the unit being filled, as fp32.
    fn fill_param(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        values: &TensorSpec,
    ) -> PyResult<()> {
        let values = values.f32()?;
        let done = py.detach(|| self.inner.fill_param(unit, param, start, values));
        map(py, done)
    }

    /// Gives bytes `start..` of one frozen parameter of the unit being filled, as they are.
    fn fill_bytes(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        bytes: &TensorSpec,
    ) -> PyResult<()> {
        let bytes = bytes.bytes()?;
        let done = py.detach(|| self.inner.fill_bytes(unit, param, start, bytes));
        map(py, done)
    }

    /// Reads bytes `start..` of one frozen parameter into a uint8 tensor, as they are.
    fn read_bytes(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        out: &TensorSpec,
    ) -> PyResult<()> {
        let out = out.bytes_mut()?;
        let done = py.detach(|| self.inner.read_bytes(unit, param, start, out));
        map(py, done)
    }

    /// Replaces bytes `start..` of one frozen parameter where this rank keeps them; all else stays.
    fn write_bytes(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        bytes: &TensorSpec,
    ) -> PyResult<()> {
        let bytes = bytes.bytes()?;
        let done = py.detach(|| self.inner.write_bytes(unit, param, start, bytes));
        map(py, done)
    }

    /// Writes what was filled to where it is at home.
    fn fill_commit(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.fill_commit(unit)))
    }

    /// Writes elements `start..` of one parameter's "weights", "grad" or a state tensor of its rule, as fp32, where this
    /// rank keeps them; all else stays.
    fn write_param(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        part: &str,
        start: u64,
        values: &TensorSpec,
    ) -> PyResult<()> {
        let values = values.f32()?;
        let done = if part == GRADIENT {
            py.detach(|| self.inner.write_grad(unit, param, start, values))
        } else {
            let name = state_name(part);
            py.detach(|| self.inner.write_param(unit, param, name, start, values))
        };
        map(py, done)
    }

    /// Reads elements `start..` of one parameter into an fp32 tensor.
    fn read_param(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        part: &str,
        start: u64,
        out: &TensorSpec,
    ) -> PyResult<()> {
        let out = out.f32_mut()?;
        let done = if part == GRADIENT {
            py.detach(|| self.inner.read_grad(unit, param, start, out))
        } else {
            let name = state_name(part);
            py.detach(|| self.inner.read_param(unit, param, name, start, out))
        };
        map(py, done)
    }

    /// Updates made so far to one parameter.
    fn updates(&self, py: Python<'_>, unit: usize, param: usize) -> PyResult<u64> {
        map(py, py.detach(|| self.inner.updates(unit, param)))
    }

    /// Sets the number of updates made so far to one parameter.
    fn set_updates(&self, py: Python<'_>, unit: usize, param: usize, updates: u64) -> PyResult<()> {
        map(
            py,
            py.detach(|| self.inner.set_updates(unit, param, updates)),
        )
    }

    /// Makes this rank's part of the unit's weights readable and holds it; returns whether the other ranks' parts are
    /// there, too. With `covered` nothing of it can be read before that.
    #[pyo3(signature = (unit, covered = false))]
    fn gather(&self, py: Python<'_>, unit: usize, covered: bool) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.gather(unit, covered)))
    }

    /// Where the parts that a gathered unit lacks are to be put; `None` where that is under its window.
    fn beside(&self, py: Python<'_>, unit: usize) -> PyResult<Option<PyWindow>> {
        let found = map(py, py.detach(|| self.inner.beside(unit)))?;
        Ok(found.map(PyWindow::from))
    }

    /// The unit's weights are about to change while somebody may read them unannounced.
    fn cover(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.cover(unit)))
    }

    /// Tells of readers whose weights lie on other ranks.
    fn bringer(&self) -> PyBringer {
        PyBringer::new(self.inner.bringer())
    }

    /// As `gather`, ahead of use; `None` where units that are held leave no room, alike on all ranks.
    #[pyo3(signature = (unit, covered = false))]
    fn gather_ahead(&self, py: Python<'_>, unit: usize, covered: bool) -> PyResult<Option<bool>> {
        map(py, py.detach(|| self.inner.gather_ahead(unit, covered)))
    }

    /// Whether a unit's weights have room beside those of all units that are held.
    fn has_room(&self, py: Python<'_>, unit: usize) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.has_room(unit)))
    }

    /// The other ranks' parts of a gathered unit's weights have been put under its window.
    fn set_all_shards_valid(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.set_all_shards_valid(unit)))
    }

    /// (process, descriptor) by which the other ranks of this host find this one; `None` where nothing is shared.
    fn segment_handle(&self, py: Python<'_>) -> PyResult<Option<(u32, i32)>> {
        let segment_handle = map(py, py.detach(|| self.inner.segment_handle()))?;
        Ok(segment_handle.map(|segment_handle| (segment_handle.pid, segment_handle.descriptor)))
    }

    /// Takes up the connection to all ranks, whose handles come in rank order.
    fn join(&self, py: Python<'_>, handles: Vec<(u32, i32)>) -> PyResult<()> {
        let handles: Vec<SegmentHandle> = handles
            .into_iter()
            .map(|(pid, descriptor)| SegmentHandle { pid, descriptor })
            .collect();
        map(py, py.detach(|| self.inner.join(&handles)))
    }

    /// Ends every present and later wait for another rank with an error that says `line` and blames `ranks`.
    fn cancel(&self, line: String, ranks: Vec<u32>) {
        self.inner.cancel(line, ranks);
    }

    /// Ends the unit's part of this backward: its gradients go out to the ranks that keep them.
    fn send(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.send(unit)))
    }

    /// Sums the unit's gradients once every rank has sent them; with `wait`, waits for that. Returns whether it did.
    fn receive(&self, py: Python<'_>, unit: usize, wait: bool) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.receive(unit, wait)))
    }

    /// (address, bytes) of what the unit sends, where the caller carries it; valid until `receive_from`.
    fn outgoing(&self, py: Python<'_>, unit: usize) -> PyResult<(usize, usize)> {
        map(py, py.detach(|| self.inner.outgoing(unit)))
    }

    /// (address, bytes) of where the other ranks' gradients of what this rank keeps have to come, rank after rank;
    /// valid until `receive_from`. One unit at a time.
    fn incoming(&self, py: Python<'_>, unit: usize) -> PyResult<(usize, usize)> {
        map(py, py.detach(|| self.inner.incoming(unit)))
    }

    /// Sums what has come in with this rank's own, in rank order.
    fn receive_from(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.receive_from(unit)))
    }

    /// Takes the sums of a unit over all ranks, not yet scaled, where the caller sums them.
    fn receive_sum(&self, py: Python<'_>, unit: usize, sums: &TensorSpec) -> PyResult<()> {
        let sums = sums.f32()?;
        map(py, py.detach(|| self.inner.receive_sum(unit, sums)))
    }

    /// (address, bytes) of room for "codes", "residuals" or "incoming" messages, valid until `close`.
    fn room(&self, py: Python<'_>, name: &str) -> PyResult<(usize, usize)> {
        let room = match name {
            "codes" => Room::Codes,
            "residuals" => Room::Residuals,
            "incoming" => Room::Incoming,
            other => return Err(unknown("room", other, &["codes", "residuals", "incoming"])),
        };
        map(py, py.detach(|| self.inner.room(room)))
    }

    /// (address, bytes) of the gradients of a unit that this rank keeps, in the gradient dtype, a slice per replica.
    fn kept_gradients(&self, py: Python<'_>, unit: usize) -> PyResult<(usize, usize)> {
        map(py, py.detach(|| self.inner.kept_gradients(unit)))
    }

    /// One byte for each trainable parameter: 1 if it has had a gradient since the last step.
    fn accumulated(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        let accumulated = map(py, py.detach(|| self.inner.accumulated()))?;
        Ok(accumulated.into_iter().map(u8::from).collect())
    }

    /// Sets that to what holds over all ranks.
    fn set_accumulated(&self, py: Python<'_>, accumulated: Vec<u8>) -> PyResult<()> {
        let accumulated: Vec<bool> = accumulated.into_iter().map(|flag| flag != 0).collect();
        map(py, py.detach(|| self.inner.set_accumulated(&accumulated)))
    }

    /// (first, one past the last) element of the unit's layout that this rank keeps.
    fn shard(&self, py: Python<'_>, unit: usize) -> PyResult<(u64, u64)> {
        map(py, py.detach(|| self.inner.shard(unit)))
    }

    /// The parts of parameters that this rank saves: (parameter, first element in it, elements).
    fn pieces(&self, py: Python<'_>, unit: usize) -> PyResult<Vec<(usize, u64, u64)>> {
        map(py, py.detach(|| self.inner.pieces(unit)))
    }

    /// The parts of parameters that this rank keeps at home: (parameter, first element in it, elements).
    fn kept_pieces(&self, py: Python<'_>, unit: usize) -> PyResult<Vec<(usize, u64, u64)>> {
        map(py, py.detach(|| self.inner.kept_pieces(unit)))
    }

    /// Starts reading a unit if there is room; whether it is here or on its way.
    fn prefetch(&self, py: Python<'_>, unit: usize) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.prefetch(unit)))
    }

    /// Begins or ends a pass: makes sure that late readers of weights are caught, and raises what could not be brought
    /// for one.
    fn watch_readers(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.watch_readers()))
    }

    /// Makes what was written into a gathered unit's weights, under their window, the live weights. With one rank.
    fn rewrite_weights(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.rewrite_weights(unit)))
    }

    /// Lets a unit's memory be taken by another one. Idempotent.
    fn release(&self, py: Python<'_>, unit: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.release(unit)))
    }

    /// Takes elements `start..` of one parameter's gradient; with `norm`, also its part of the global norm. A
    /// gradient comes whole or in parts, in order.
    pub(crate) fn accumulate(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        start: u64,
        grad: &TensorSpec,
        norm: bool,
    ) -> PyResult<()> {
        let source = grad.grad()?;
        let done = py.detach(|| self.inner.accumulate(unit, param, start, source, norm));
        map(py, done)
    }

    /// (address, bytes) of where who brings a first gradient puts it before `gradient_arrived`; None where it is added.
    fn gradient_room(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
    ) -> PyResult<Option<(usize, usize)>> {
        map(py, py.detach(|| self.inner.gradient_room(unit, param)))
    }

    /// A gradient lies where `gradient_room` said: takes its part of the global norm.
    fn gradient_arrived(&self, py: Python<'_>, unit: usize, param: usize) -> PyResult<()> {
        map(py, py.detach(|| self.inner.gradient_arrived(unit, param)))
    }

    /// Adds to rows (int64) of one parameter's gradient, of `count` rows in all.
    fn accumulate_rows(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        count: u64,
        rows: &TensorSpec,
        grad: &TensorSpec,
    ) -> PyResult<()> {
        let (rows, source) = (rows.i64()?, grad.grad()?);
        let done = py.detach(|| self.inner.accumulate_rows(unit, param, count, rows, source));
        map(py, done)
    }

    /// (sum of squares, any infinity or NaN, parameters with a gradient)
    fn grad_norm(&self, py: Python<'_>) -> PyResult<(f64, bool, usize)> {
        let norm = map(py, py.detach(|| self.inner.grad_norm()))?;
        Ok((norm.sum_squares, norm.nonfinite, norm.accumulated))
    }

    /// Notes that a gradient of a unit on the device has come; returns whether the parameter had one.
    fn note_gradient(&self, py: Python<'_>, unit: usize, param: usize) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.note_gradient(unit, param)))
    }

    /// Whether a parameter has had a gradient since the last step.
    fn has_gradient(&self, py: Python<'_>, unit: usize, param: usize) -> PyResult<bool> {
        map(py, py.detach(|| self.inner.has_gradient(unit, param)))
    }

    /// Notes the sum of squares of that gradient, and whether it holds an infinity or a NaN.
    fn note_norm(
        &self,
        py: Python<'_>,
        unit: usize,
        param: usize,
        sum_squares: f64,
        nonfinite: bool,
    ) -> PyResult<()> {
        let norm = AccumulateStats {
            sum_squares,
            nonfinite,
        };
        map(py, py.detach(|| self.inner.note_norm(unit, param, norm)))
    }

    /// What the next step updates of a unit on the device.
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn away_runs(
        &self,
        py: Python<'_>,
        unit: usize,
        groups: Vec<PyRef<'_, Rule>>,
    ) -> PyResult<Vec<RunRow>> {
        let groups: Vec<Optimizer> = groups.iter().map(|rule| rule.optimizer()).collect();
        let found = map(py, py.detach(|| self.inner.away_runs(unit, &groups)))?;
        let row = |run: AwayRun| (run.start, run.count, run.group, run.updates, run.stream);
        Ok(found.into_iter().map(row).collect())
    }

    /// Ends all work with the state: a step failed where units on the device are updated, before or after it had `begun`.
    fn fail_step(&self, py: Python<'_>, cause: &str, begun: bool) -> PyResult<()> {
        map(py, py.detach(|| self.inner.fail_step(cause, begun)))
    }

    /// Raises where a step has failed half way.
    fn check_usable(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.check_usable()))
    }

    /// Forgets all gradients that have been accumulated.
    fn clear_gradients(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.clear_gradients()))
    }

    /// Lends weight and gradient of the only parameter of a unit until the next step ends.
    fn lend(
        &self,
        py: Python<'_>,
        unit: usize,
        weight: &TensorSpec,
        grad: &TensorSpec,
    ) -> PyResult<()> {
        let lent = Lent {
            weight: weight.lease(py),
            grad: grad.lease(py),
            grad_dtype: grad.float()?,
        };
        map(py, py.detach(|| self.inner.lend(unit, lent)))
    }

    /// One update of every parameter whose gradient has been accumulated. With state on disk it goes on after the
    /// call, and each later use of a unit waits until that unit is done.
    #[expect(clippy::needless_pass_by_value, reason = "how arguments are extracted")]
    fn step(&self, py: Python<'_>, groups: Vec<PyRef<'_, Rule>>, grad_scale: f64) -> PyResult<()> {
        let groups: Vec<Optimizer> = groups.iter().map(|rule| rule.optimizer()).collect();
        map(py, py.detach(|| self.inner.step(&groups, grad_scale)))
    }

    /// Ends the step under way, if there is one.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        map(py, py.detach(|| self.inner.finish()))
    }

    /// Payload bytes per bucket: {name: (current, peak)}, and "total".
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        report::usage(py, &self.inner)
    }

    /// Records what is done and when.
    fn recorder(&self) -> PyRecorder {
        PyRecorder::new(Arc::clone(&self.inner))
    }

    /// Disk traffic since the start; `None` where nothing is at home on disk.
    fn io<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let found = map(py, py.detach(|| self.inner.io()))?;
        found.map(|found| report::io(py, &found)).transpose()
    }

    /// Ends all disk traffic, removes the scratch files and gives all memory back. Idempotent.
    #[pyo3(signature = (readers = None))]
    fn close(&self, py: Python<'_>, readers: Option<Vec<usize>>) -> PyResult<()> {
        let readers = readers.unwrap_or_default();
        map(py, py.detach(|| self.inner.close(&readers)))
    }
}

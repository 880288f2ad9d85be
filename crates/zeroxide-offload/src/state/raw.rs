//! Frozen parameters as bytes: given, read and replaced without a look at what they mean.
//!
//! The layout counts a unit in words of the compute dtype. A frozen parameter of any dtype takes as many words as its
//! bytes need, from the first byte of the first word on; what is left of the last word is zero. Rounding never sees it,
//! so every bit pattern stays as it is.

use std::ops::Range;

use zeroxide_layout::StateKey;

use crate::core::{Core, to_usize};
use crate::error::{Result, misuse};
use crate::weights::residence::UnitWeights;

impl Core {
    /// Gives bytes `start..` of one frozen parameter of the unit being filled.
    pub(crate) fn fill_bytes(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let given = self.byte_span("fill_bytes", unit, param, start, bytes.len())?;
        if self.filling() != Some((unit, StateKey::WEIGHT)) {
            return misuse(
                "fill_bytes",
                format!("the weights of {} are not filled", self.units[unit].name),
            );
        }
        let element = self.compute.size() as u64;
        let window_range = in_bytes(&self.filled_window(unit), element);
        let this = &mut self.units[unit];
        let own = in_bytes(&this.own(), element);
        if let (Some(window), Some((both, from))) =
            (this.weights.window(), overlap(&given, &window_range))
        {
            // A lease starts and ends anywhere in the window.
            let mut lease = window.lease(to_usize(both.start)..to_usize(both.end))?;
            lease.copy_from_slice(&bytes[from]);
        }
        if let (
            UnitWeights::Moving {
                home: Some(home), ..
            },
            Some((both, from)),
        ) = (&mut this.weights, overlap(&given, &own))
        {
            let local = to_usize(both.start - own.start)..to_usize(both.end - own.start);
            home[local].copy_from_slice(&bytes[from]);
        }
        Ok(())
    }

    /// Reads bytes `start..` of one frozen parameter, which this rank must keep.
    pub(crate) fn read_bytes(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        out: &mut [u8],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("read_bytes")?;
        let wanted = self.byte_span("read_bytes", unit, param, start, out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        self.finish_step()?;
        self.wait_reads()?;
        let element = self.compute.size() as u64;
        let words = in_words(&wanted, element);
        let own = self.units[unit].own();
        if words.start < own.start || words.end > own.end {
            return misuse(
                "read_bytes",
                format!(
                    "words {words:?} of unit {}, of which this rank has {own:?}",
                    self.units[unit].name
                ),
            );
        }
        let size = self.compute.size();
        self.read_elements(unit, StateKey::WEIGHT, words.clone(), |offset, stored| {
            let at = words.start * element + (offset * size) as u64;
            let here = at..at + stored.len() as u64;
            if let Some((both, from)) = overlap(&here, &wanted) {
                let to = to_usize(both.start - wanted.start)..to_usize(both.end - wanted.start);
                out[to].copy_from_slice(&stored[from]);
            }
        })
    }

    /// Replaces bytes `start..` of one frozen parameter wherever this rank keeps them, as
    /// [`write_param`](Self::write_param) does with values.
    pub(crate) fn write_bytes(
        &mut self,
        unit: usize,
        param: usize,
        start: u64,
        bytes: &[u8],
    ) -> Result<()> {
        self.check_usable()?;
        self.check_between_steps("write_bytes")?;
        let given = self.byte_span("write_bytes", unit, param, start, bytes.len())?;
        if self.filling().is_some() {
            return misuse("write_bytes", "a unit is being filled");
        }
        self.state.cache.clear();
        self.finish_step()?;
        self.wait_reads()?;
        let element = self.compute.size() as u64;
        let words = in_words(&given, element);
        let all = words.end - words.start == self.units[unit].layout.numel(param);
        self.write_live(unit, &words, all, |first, target| {
            let at = first * element;
            let here = at..at + target.len() as u64;
            if let Some((both, to)) = overlap(&here, &given) {
                let from = to_usize(both.start - given.start)..to_usize(both.end - given.start);
                target[to].copy_from_slice(&bytes[from]);
            }
        })
    }

    /// Where `count` bytes from byte `start` of a frozen parameter lie, in bytes of the unit's layout.
    fn byte_span(
        &self,
        call: &'static str,
        unit: usize,
        param: usize,
        start: u64,
        count: usize,
    ) -> Result<Range<u64>> {
        self.check_param(call, unit, param)?;
        self.check_here(call, unit)?;
        let this = &self.units[unit];
        let element = self.compute.size() as u64;
        let room = this.layout.numel(param) * element;
        let end = start + count as u64;
        if this.params[param].trainable || end > room {
            return misuse(
                call,
                format!(
                    "bytes {start}..{end} of {room} of parameter {param} of unit {}, {}",
                    this.name,
                    if this.params[param].trainable {
                        "which is trainable"
                    } else {
                        "which is frozen"
                    }
                ),
            );
        }
        let first = this.layout.offset(param) * element;
        Ok(first + start..first + end)
    }
}

fn in_bytes(words: &Range<u64>, element: u64) -> Range<u64> {
    words.start * element..words.end * element
}

/// The words that hold `bytes`.
fn in_words(bytes: &Range<u64>, element: u64) -> Range<u64> {
    bytes.start / element..bytes.end.div_ceil(element)
}

/// What two ranges have in common, and where that lies in the first one.
fn overlap(range: &Range<u64>, other: &Range<u64>) -> Option<(Range<u64>, Range<usize>)> {
    let both = range.start.max(other.start)..range.end.min(other.end);
    (both.start < both.end).then(|| {
        let from = to_usize(both.start - range.start);
        let count = to_usize(both.end - both.start);
        (both, from..from + count)
    })
}

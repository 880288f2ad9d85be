//! The public face, where it is about whole values: initial weights, checkpoints, and what users read and change.

use crate::api::Offload;
use crate::error::Result;

impl Offload {
    /// Starts to fill the state tensor `name` of a unit: "weight", which stands for the weight with all its bits, or one
    /// of its rule's own.
    pub fn fill_begin(&self, unit: usize, name: &str) -> Result<()> {
        self.with("fill_begin", |core| core.fill_begin(unit, name))
    }

    /// Gives elements `start..` of one parameter of the unit being filled.
    pub fn fill_param(&self, unit: usize, param: usize, start: u64, values: &[f32]) -> Result<()> {
        let values = &*self.outside(values);
        self.with("fill_param", |core| {
            core.fill_param(unit, param, start, values)
        })
    }

    /// Gives bytes `start..` of one frozen parameter of the unit being filled, as they are.
    pub fn fill_bytes(&self, unit: usize, param: usize, start: u64, bytes: &[u8]) -> Result<()> {
        let bytes = &*self.outside(bytes);
        self.with("fill_bytes", |core| {
            core.fill_bytes(unit, param, start, bytes)
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
        self.fill_outside(out, |out| {
            self.with("read_param", |core| {
                core.read_param(unit, param, name, start, out)
            })
        })
    }

    /// Reads bytes `start..` of one frozen parameter, as they are.
    pub fn read_bytes(&self, unit: usize, param: usize, start: u64, out: &mut [u8]) -> Result<()> {
        self.fill_outside(out, |out| {
            self.with("read_bytes", |core| {
                core.read_bytes(unit, param, start, out)
            })
        })
    }

    /// Writes elements `start..` of one parameter, given as fp32, where this rank keeps them; all else stays. Every rank
    /// calls it, with the whole parameter or with its own part.
    pub fn write_param(
        &self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        values: &[f32],
    ) -> Result<()> {
        let values = &*self.outside(values);
        self.with("write_param", |core| {
            core.write_param(unit, param, name, start, values)
        })
    }

    /// Replaces bytes `start..` of one frozen parameter where this rank keeps them; called as
    /// [`write_param`](Self::write_param) is.
    pub fn write_bytes(&self, unit: usize, param: usize, start: u64, bytes: &[u8]) -> Result<()> {
        let bytes = &*self.outside(bytes);
        self.with("write_bytes", |core| {
            core.write_bytes(unit, param, start, bytes)
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
}

//! The values of the last commit, for who copies them while training goes on: a save that training need not wait for.
//!
//! Reads take no lock of the core's and see none of its memory. What is read stays where it is until the reader is gone:
//! until then the store prepares no further commit.

use std::ops::Range;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};

use zeroxide_layout::{
    BlockId, Dtype, PAGE, Role, StateKey, StateLayout, StateTensor, TILE_QUANTUM, Tiling,
    UnitLayout,
};
use zeroxide_memory::{Arena, Bucket, Lease};
use zeroxide_optim::{carry_exact, exact_suffices, join_live, widen};
use zeroxide_storage::{BlockStore, Pin, StorageError};

use crate::core::{Core, to_usize};
use crate::durable::mirrored;
use crate::error::{OffloadError, Result, misuse};
use crate::state::read::read_moment;
use crate::tile_io::{tile_bytes, tiles_with};
use crate::weights::gather::block;

/// What a reader knows of one unit.
struct ReadUnit {
    name: String,
    layout: UnitLayout,
    tensors: StateLayout,
    base: u64,
    /// The tiles of each state tensor in the store.
    tiles: Vec<(StateKey, Tiling)>,
    /// Weights are at home in host memory, where they may have been edited beside their exact halves.
    edited: bool,
    trainable: Vec<bool>,
}

/// Memory for one tile, and the tile that is in it.
struct Buffer {
    arena: Arena,
    tile: Option<(BlockId, u32, Lease)>,
}

/// Reads the last commit.
pub struct CommittedReads {
    store: Arc<BlockStore>,
    units: Vec<ReadUnit>,
    compute: Dtype,
    buffer: Mutex<Buffer>,
    _pin: Pin,
}

impl Core {
    /// A reader of the last commit.
    pub(crate) fn committed_reads(&mut self) -> Result<CommittedReads> {
        self.check_durable("committed_reads")?;
        let units = self
            .units
            .iter()
            .map(|unit| {
                let copies = mirrored(unit);
                let tiles = unit.tensors.tensors().iter().map(|tensor| {
                    let found = copies.iter().find(|(key, _)| *key == tensor.key);
                    let tiles = match found {
                        Some((_, elements)) => Tiling::new(*elements, self.mirror_tile)?,
                        None => unit.tiles_of(tensor.key),
                    };
                    Ok((tensor.key, tiles))
                });
                Ok(ReadUnit {
                    name: unit.name.clone(),
                    layout: unit.layout.clone(),
                    tensors: unit.tensors.clone(),
                    base: unit.base,
                    tiles: tiles.collect::<Result<_>>()?,
                    edited: copies.iter().any(|(key, _)| *key == StateKey::WEIGHT),
                    trainable: unit.params.iter().map(|param| param.trainable).collect(),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let store = Arc::clone(&self.disk().store);
        let pin = store.pin()?;
        let largest = units.iter().map(ReadUnit::largest_tile).max().unwrap_or(0);
        Ok(CommittedReads {
            units,
            compute: self.compute,
            buffer: Mutex::new(Buffer {
                arena: Arena::new(&self.budget, Bucket::Staging, largest.max(PAGE))?,
                tile: None,
            }),
            store,
            _pin: pin,
        })
    }
}

impl ReadUnit {
    fn largest_tile(&self) -> usize {
        let bytes = |(key, tiles): &(StateKey, Tiling)| {
            let elements = tiles.tile().min(tiles.len()).max(TILE_QUANTUM);
            let found = self.tensors.find(key.name());
            found.map_or(0, |tensor| to_usize(tensor.disk_bytes(elements)))
        };
        self.tiles.iter().map(bytes).max().unwrap_or(0)
    }

    /// Where elements `start..` of a parameter lie in the unit's layout; this rank must have them.
    fn within(
        &self,
        call: &'static str,
        param: usize,
        start: u64,
        count: u64,
    ) -> Result<Range<u64>> {
        if param >= self.trainable.len() {
            return misuse(call, format!("no parameter {param} in unit {}", self.name));
        }
        let at = self.layout.offset(param) + start;
        let own = self.tiles.first().map_or(0, |(_, tiles)| tiles.len());
        let own = self.base..self.base + own;
        if start + count > self.layout.numel(param) || at < own.start || at + count > own.end {
            let name = &self.name;
            return misuse(
                call,
                format!(
                    "elements {start}..{} of parameter {param} of unit {name}, of which this rank has {own:?}",
                    start + count
                ),
            );
        }
        Ok(at..at + count)
    }
}

impl CommittedReads {
    /// Reads elements `start..` of one parameter as fp32: "weight", or a state tensor of its rule.
    pub fn read_param(
        &self,
        unit: usize,
        param: usize,
        name: &str,
        start: u64,
        out: &mut [f32],
    ) -> Result<()> {
        let this = self.unit("read_param", unit)?;
        let range = this.within("read_param", param, start, out.len() as u64)?;
        let Some(tensor) = this.tensors.find(name).filter(|it| it.role != Role::Exact) else {
            return misuse(
                "read_param",
                format!("unit {} has no state {name:?}", this.name),
            );
        };
        if tensor.role == Role::Moment {
            if !this.trainable[param] {
                out.fill(0.0);
                return Ok(());
            }
            let read = read_moment(tensor, range, out, |range, visit| {
                self.visit(unit, tensor, range, visit)
            });
            return match read {
                // Moments that no step has written have their initial values, and are nowhere: all of a unit or none.
                Err(OffloadError::Storage(StorageError::NeverWritten { .. })) => {
                    out.fill(tensor.initial);
                    Ok(())
                }
                other => other,
            };
        }
        let (compute, tensors) = (self.compute, &this.tensors);
        let exact = tensors.exact().filter(|_| this.trainable[param]);
        let Some(exact) = exact else {
            return self.visit(unit, tensor, range, &mut |offset, bytes| {
                let count = bytes.len() / compute.size();
                widen(compute, bytes, &mut out[offset..offset + count]);
            });
        };
        let size = to_usize(exact.bytes(1));
        self.visit(unit, exact, range.clone(), &mut |offset, bytes| {
            let count = bytes.len() / size;
            carry_exact(tensors, bytes, &mut out[offset..offset + count]);
        })?;
        if exact_suffices(tensors) && !this.edited {
            return Ok(());
        }
        self.visit(unit, tensor, range, &mut |offset, bytes| {
            let count = bytes.len() / compute.size();
            join_live(tensors, bytes, &mut out[offset..offset + count]);
        })
    }

    /// Reads bytes `start..` of one frozen parameter, as they are.
    pub fn read_bytes(&self, unit: usize, param: usize, start: u64, out: &mut [u8]) -> Result<()> {
        let this = self.unit("read_bytes", unit)?;
        let word = self.compute.size() as u64;
        let (first, end) = (start / word, (start + out.len() as u64).div_ceil(word));
        let range = this.within("read_bytes", param, first, end - first)?;
        let Some(tensor) = this.tensors.find(StateKey::WEIGHT.name()) else {
            return misuse("read_bytes", format!("unit {} has no weights", this.name));
        };
        let skipped = to_usize(start - first * word);
        self.visit(unit, tensor, range, &mut |offset, bytes| {
            // Bytes from the first word on, of which the wanted ones begin at `skipped`.
            let at = offset * to_usize(word);
            let (from, to) = (at.max(skipped), (at + bytes.len()).min(skipped + out.len()));
            if from < to {
                out[from - skipped..to - skipped].copy_from_slice(&bytes[from - at..to - at]);
            }
        })
    }

    fn unit(&self, call: &'static str, unit: usize) -> Result<&ReadUnit> {
        match self.units.get(unit) {
            Some(found) => Ok(found),
            None => misuse(call, format!("unit {unit} of {}", self.units.len())),
        }
    }

    /// Calls `visit(offset from range.start, bytes)` for the pieces of elements `range` of the layout.
    fn visit(
        &self,
        unit: usize,
        tensor: &StateTensor,
        range: Range<u64>,
        visit: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<()> {
        let this = &self.units[unit];
        let tiles = this
            .tiles
            .iter()
            .find(|(key, _)| *key == tensor.key)
            .map(|(_, tiles)| *tiles)
            .expect("every tensor of the layout has its tiles");
        let local = range.start - this.base..range.end - this.base;
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        for (tile, inside, first) in tiles_with(tiles, local) {
            let bytes = tile_bytes(tensor, &tiles.range(tile));
            let found = self.bring(&mut buffer, block(unit, tensor.key), tile, bytes)?;
            visit(first, &found[tensor.byte_range(&inside)]);
        }
        Ok(())
    }

    fn bring<'a>(
        &self,
        buffer: &'a mut Buffer,
        id: BlockId,
        tile: u32,
        bytes: usize,
    ) -> Result<&'a Lease> {
        let hit = |held: &(BlockId, u32, Lease)| (held.0, held.1) == (id, tile);
        if !buffer.tile.as_ref().is_some_and(hit) {
            buffer.tile = None;
            let lease = buffer.arena.lease(bytes, PAGE)?;
            let (sender, receiver) = channel();
            self.store
                .start_read_committed(id, tile, lease, 0, &sender)
                .map_err(|(error, _)| error)?;
            let read = receiver.recv().map_err(|_| StorageError::Closed)?;
            read.result?;
            self.store.verify_committed(id, tile, &read.buffer)?;
            buffer.tile = Some((id, tile, read.buffer));
        }
        Ok(&buffer.tile.as_ref().expect("brought just now").2)
    }
}

//! The update of one tile: every thread takes one contiguous part of it, in pieces that stay in its cache.

use std::ops::Range;
use std::sync::Mutex;

use zeroxide_layout::{Dtype, Role, StateLayout};
use zeroxide_memory::Lease;
use zeroxide_optim::{Draw, Grad, Pool};
use zeroxide_storage::{CHECKSUM_PIECE, checksum, join_checksums};

use crate::core::{byte_range, to_usize};
use crate::disk::Disk;
use crate::error::{Result, misuse};
use crate::gradients::kept::GRADIENT;
use crate::step::plan::Segment;
use crate::unit::{StateBlocks, Unit};
use crate::weights::gather::block;
use crate::weights::residence::UnitWeights;

/// Elements a thread checks, updates and checks again before it goes on: all their bytes fit in its second-level cache.
/// Also the alignment of the parts that threads take. A whole number of checksum pieces of every tensor that is not narrow.
const PIECE: usize = CHECKSUM_PIECE / 2;

/// The gradient of a piece of a step that a unit has missed.
static ZEROS: [f32; PIECE] = [0.0; PIECE];

/// What the update of a tile needs beside the unit.
pub(crate) struct Update<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) disk: Option<&'a Disk>,
    pub(crate) grad: Dtype,
    /// The gradient is zero, and nowhere.
    pub(crate) without_gradient: bool,
    pub(crate) unit: usize,
    pub(crate) tile: u32,
}

/// Number of the live weight in every layout.
const LIVE: usize = 0;

/// A state tensor of a tile.
struct Source<'a> {
    tensor: usize,
    bytes: &'a mut [u8],
    check: bool,
    write: bool,
}

impl<'a> Source<'a> {
    fn new(tensor: usize, bytes: &'a mut [u8], check: bool, write: bool) -> Self {
        Self {
            tensor,
            bytes,
            check,
            write,
        }
    }
}

/// The bytes that one part has of one state tensor.
struct Slice<'a> {
    /// Number of the tensor in the unit's layout.
    tensor: usize,
    bytes: &'a mut [u8],
    /// The bytes came from disk: their checksum is to be compared.
    check: bool,
    /// The bytes go to disk: their new checksum is wanted.
    write: bool,
    /// Checksums of its pieces, before and after the update.
    before: Vec<u64>,
    after: Vec<u64>,
}

/// What one thread updates.
struct ThreadChunk<'a> {
    /// First element, counted in the unit.
    start: u64,
    /// Elements to be updated; the weight may go on after them.
    len: usize,
    slices: Vec<Slice<'a>>,
    grad: &'a [u8],
    /// The gradient is zero, and `grad` empty.
    zero: bool,
    /// Checksums of the pieces of gradients that came from disk.
    grad_checks: Option<Vec<u64>>,
}

/// Updates a tile in place. `buffers` are state tensors of it by their number in the unit's layout, `gradient` its
/// gradients where those have come from disk; returns the new checksums of what goes to disk, by the same numbers.
pub(crate) fn update_tile(
    update: &Update<'_>,
    unit: &mut Unit,
    buffers: &mut [(usize, Lease)],
    gradient: Option<&Lease>,
    segments: &[Segment],
) -> Result<Vec<(usize, u64)>> {
    let range = unit.state_tiles.range(update.tile);
    let weight_range = unit.weight_tiles.range(update.tile);
    let tensors = &unit.tensors;
    let weight_element = tensors.compute().size();
    let (base, on_disk) = (unit.base, unit.weights.on_disk());
    let pristine = unit.state.is_pristine();
    let (lent_weight, lent_grad);
    let mut shard;
    let mut sources: Vec<Source<'_>> = Vec::new();
    let (grad, grad_dtype): (&[u8], Dtype) = match &mut unit.weights {
        UnitWeights::Borrowed { lent } => {
            let Some(lent) = lent.as_mut() else {
                return misuse("step", format!("the weight of {} was not lent", unit.name));
            };
            (lent_weight, lent_grad) = (&mut lent.weight, &lent.grad);
            let numel = unit.layout.numel(0);
            let real = range.start..range.end.min(numel);
            let bytes = byte_range(&real, weight_element);
            sources.push(Source::new(LIVE, &mut lent_weight[bytes], false, false));
            (
                &lent_grad[byte_range(&real, lent.grad_dtype.size())],
                lent.grad_dtype,
            )
        }
        weights => {
            shard = weights.shard_bytes(base, &weight_range, weight_element)?;
            if let Some(bytes) = shard.as_deref_mut() {
                sources.push(Source::new(LIVE, bytes, false, on_disk));
            }
            let grad: &[u8] = match gradient {
                _ if update.without_gradient => &[],
                Some(read) => read,
                None => {
                    let kept = unit.grad.bytes();
                    let kept = kept.expect("what is not on disk is in memory until its step");
                    &kept[byte_range(&range, update.grad.size())]
                }
            };
            (grad, update.grad)
        }
    };
    let fresh = |tensor: usize| pristine && tensors.tensors()[tensor].role == Role::Moment;
    let narrow = |tensor: usize| tensors.tensors()[tensor].is_narrow();
    verify_narrow(update, tensors, buffers, |tensor| {
        narrow(tensor) && !fresh(tensor)
    })?;
    sources.extend(at_home(tensors, &mut unit.state, &range));
    sources.extend(from_disk(tensors, buffers, &range, fresh));
    // The kernels take tensors in the order of the layout; from disk they come in any.
    sources.sort_by_key(|source| source.tensor);
    let len = to_usize(range.end - range.start);
    let mut parts = divide(
        update.pool.threads(),
        tensors,
        sources,
        base + range.start,
        len,
        grad,
        grad_dtype.size(),
    );
    for part in &mut parts {
        part.grad_checks = gradient.map(|_| Vec::new());
        part.zero = update.without_gradient;
    }
    let parts = run_all(update.pool, parts, |part| {
        part.run(tensors, segments, grad_dtype);
    });
    verify_gradient(update, gradient, &parts)?;
    let mut written = checksums(update, tensors, &parts)?;
    drop(parts);
    written.extend(narrow_checksums(update.pool, buffers, narrow));
    Ok(written)
}

/// Runs every part on a thread of its own, and returns them in their order.
fn run_all<'a>(
    pool: &Pool,
    parts: Vec<ThreadChunk<'a>>,
    act: impl Fn(&mut ThreadChunk<'a>) + Sync,
) -> Vec<ThreadChunk<'a>> {
    let parts: Vec<_> = parts.into_iter().map(Mutex::new).collect();
    pool.run(parts.len(), |index| {
        act(&mut parts[index].lock().expect("each task has its own part"));
    });
    parts
        .into_iter()
        .map(|part| part.into_inner().expect("the pool has returned"))
        .collect()
}

/// Compares the `gradient` that came from disk, if it did, with what is known of it.
fn verify_gradient(
    update: &Update<'_>,
    gradient: Option<&Lease>,
    parts: &[ThreadChunk<'_>],
) -> Result<()> {
    let (Some(_), Some(disk)) = (gradient, update.disk) else {
        return Ok(());
    };
    let pieces = parts
        .iter()
        .flat_map(|part| part.grad_checks.iter().flatten().copied());
    let id = block(update.unit, GRADIENT);
    Ok(disk.verify_checksum(id, update.tile, join_checksums(pieces))?)
}
/// Elements `range` of the state tensors that are at home in host memory.
fn at_home<'a>(
    tensors: &StateLayout,
    state: &'a mut StateBlocks,
    range: &Range<u64>,
) -> Vec<Source<'a>> {
    let StateBlocks::Host { blocks } = state else {
        return Vec::new();
    };
    let numbered = (LIVE + 1..).zip(blocks);
    numbered
        .map(|(tensor, (_, lease))| {
            let bytes = tensors.tensors()[tensor].byte_range(range);
            Source::new(tensor, &mut lease[bytes], false, false)
        })
        .collect()
}

/// What has come from disk, or is to go there. Of a narrow tensor, what is left of its last page is no element, and its
/// checksum is taken with that.
fn from_disk<'a>(
    tensors: &StateLayout,
    buffers: &'a mut [(usize, Lease)],
    range: &Range<u64>,
    fresh: impl Fn(usize) -> bool,
) -> Vec<Source<'a>> {
    let elements = 0..range.end - range.start;
    buffers
        .iter_mut()
        .map(|(tensor, lease)| {
            let described = &tensors.tensors()[*tensor];
            if described.is_narrow() {
                let bytes = &mut lease[described.byte_range(&elements)];
                return Source::new(*tensor, bytes, false, false);
            }
            Source::new(*tensor, lease, !fresh(*tensor), true)
        })
        .collect()
}

/// Checksums of the whole buffers of `chosen` tensors, a thread each: by the number of the tensor.
fn narrow_checksums(
    pool: &Pool,
    buffers: &[(usize, Lease)],
    chosen: impl Fn(usize) -> bool,
) -> Vec<(usize, u64)> {
    let chosen = buffers.iter().filter(|(tensor, _)| chosen(*tensor));
    let mut found: Vec<(usize, u64)> = chosen.clone().map(|(tensor, _)| (*tensor, 0)).collect();
    let work = found.iter_mut().zip(chosen).collect();
    pool.run_each(
        work,
        |_, (found, (_, lease)): (&mut (usize, u64), &(_, Lease))| {
            found.1 = checksum(lease);
        },
    );
    found
}

/// Compares what was read of `chosen` tensors with what is known of it.
fn verify_narrow(
    update: &Update<'_>,
    tensors: &StateLayout,
    buffers: &[(usize, Lease)],
    chosen: impl Fn(usize) -> bool,
) -> Result<()> {
    for (tensor, checksum) in narrow_checksums(update.pool, buffers, chosen) {
        if let Some(disk) = update.disk {
            let id = block(update.unit, tensors.tensors()[tensor].key);
            disk.verify_checksum(id, update.tile, checksum)?;
        }
    }
    Ok(())
}

fn divide<'a>(
    threads: usize,
    tensors: &StateLayout,
    sources: Vec<Source<'a>>,
    start: u64,
    len: usize,
    grad: &'a [u8],
    grad_element: usize,
) -> Vec<ThreadChunk<'a>> {
    let share = len.div_ceil(threads).next_multiple_of(PIECE);
    let count = len.div_ceil(share).max(1);
    let mut parts: Vec<ThreadChunk<'a>> = (0..count)
        .map(|index| ThreadChunk {
            start: start + (index * share) as u64,
            len: share.min(len - index * share),
            slices: Vec::with_capacity(sources.len()),
            grad: clipped(
                grad,
                index * share * grad_element,
                (index + 1) * share * grad_element,
            ),
            zero: false,
            grad_checks: None,
        })
        .collect();
    for source in sources {
        let share_bytes = to_usize(tensors.tensors()[source.tensor].bytes(share as u64));
        let mut rest = source.bytes;
        for (index, part) in parts.iter_mut().enumerate() {
            // The last part takes all that is left: where frozen weights follow, they belong to the same tile.
            let take = if index + 1 == count {
                rest.len()
            } else {
                share_bytes.min(rest.len())
            };
            let (bytes, tail) = std::mem::take(&mut rest).split_at_mut(take);
            rest = tail;
            part.slices.push(Slice {
                tensor: source.tensor,
                bytes,
                check: source.check,
                write: source.write,
                before: Vec::new(),
                after: Vec::new(),
            });
        }
    }
    parts
}

fn clipped(bytes: &[u8], start: usize, end: usize) -> &[u8] {
    &bytes[start.min(bytes.len())..end.min(bytes.len())]
}

impl ThreadChunk<'_> {
    fn run(&mut self, tensors: &StateLayout, segments: &[Segment], grad_dtype: Dtype) {
        let mut at = 0;
        if let Some(checks) = &mut self.grad_checks {
            checks.extend(self.grad.chunks(CHECKSUM_PIECE).map(checksum));
        }
        self.digest_longer(tensors, false);
        while at < self.len {
            let end = (at + PIECE).min(self.len);
            self.digest(tensors, at..end, false);
            let piece = self.start + at as u64..self.start + end as u64;
            for segment in segments {
                let start = segment.range.start.max(piece.start);
                let stop = segment.range.end.min(piece.end);
                if start < stop {
                    let local = to_usize(start - self.start)..to_usize(stop - self.start);
                    self.apply(tensors, segment, local, grad_dtype);
                }
            }
            self.digest(tensors, at..end, true);
            at = end;
        }
        self.digest_longer(tensors, true);
    }

    /// Takes the checksums of elements before or after the update.
    fn digest(&mut self, tensors: &StateLayout, elements: Range<usize>, after: bool) {
        let elements = elements.start as u64..elements.end as u64;
        for slice in &mut self.slices {
            let tensor = &tensors.tensors()[slice.tensor];
            if slice.bytes.len() == to_usize(tensor.bytes(self.len as u64)) {
                slice.digest(tensor.byte_range(&elements), after);
            }
        }
    }

    /// Takes those of a weight that goes on after the part's last element: frozen elements of the same tile.
    fn digest_longer(&mut self, tensors: &StateLayout, after: bool) {
        for slice in &mut self.slices {
            let tensor = &tensors.tensors()[slice.tensor];
            if slice.bytes.len() != to_usize(tensor.bytes(self.len as u64)) {
                slice.digest(0..slice.bytes.len(), after);
            }
        }
    }

    fn apply(
        &mut self,
        tensors: &StateLayout,
        segment: &Segment,
        local: Range<usize>,
        grad_dtype: Dtype,
    ) {
        let grad = if self.zero {
            Grad::F32(&ZEROS[..local.len()])
        } else {
            let bytes = &self.grad[local.start * grad_dtype.size()..local.end * grad_dtype.size()];
            match grad_dtype {
                Dtype::F32 => Grad::F32(bytemuck::cast_slice(bytes)),
                Dtype::Bf16 => Grad::Bf16(bytemuck::cast_slice(bytes)),
                Dtype::F16 => Grad::F16(bytemuck::cast_slice(bytes)),
            }
        };
        // Every part and every parameter starts at a block, and so does what they have in common.
        let elements = local.start as u64..local.end as u64;
        let draw = Draw {
            first: self.start + elements.start - segment.range.start,
            ..segment.draw
        };
        let slices = self
            .slices
            .iter_mut()
            .map(|slice| &mut slice.bytes[tensors.tensors()[slice.tensor].byte_range(&elements)]);
        zeroxide_optim::update_drawn(&segment.step, tensors, slices, grad, draw);
    }
}

impl Slice<'_> {
    fn digest(&mut self, range: Range<usize>, after: bool) {
        let target = match (after, self.check, self.write) {
            (false, true, _) => &mut self.before,
            (true, _, true) => &mut self.after,
            _ => return,
        };
        target.extend(self.bytes[range].chunks(CHECKSUM_PIECE).map(checksum));
    }
}

/// Compares what was read with what is known of it and returns the checksums of what is to be written.
fn checksums(
    update: &Update<'_>,
    tensors: &StateLayout,
    parts: &[ThreadChunk<'_>],
) -> Result<Vec<(usize, u64)>> {
    let mut written = Vec::new();
    for index in 0..parts[0].slices.len() {
        let first = &parts[0].slices[index];
        let pieces = |after: bool| {
            parts.iter().flat_map(move |part| {
                let slice = &part.slices[index];
                if after { &slice.after } else { &slice.before }
                    .iter()
                    .copied()
            })
        };
        if first.check
            && let Some(disk) = update.disk
        {
            disk.verify_checksum(
                block(update.unit, tensors.tensors()[first.tensor].key),
                update.tile,
                join_checksums(pieces(false)),
            )?;
        }
        if first.write {
            written.push((first.tensor, join_checksums(pieces(true))));
        }
    }
    Ok(written)
}

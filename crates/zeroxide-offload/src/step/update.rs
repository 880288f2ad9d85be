//! The update of one tile: every thread takes one contiguous part of it, in pieces that stay in its cache.

use std::ops::Range;
use std::sync::Mutex;

use zeroxide_layout::{Dtype, Role, StateLayout};
use zeroxide_memory::Lease;
use zeroxide_optim::{Grad, Pool};
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
/// Also the alignment of the parts that threads take. A whole number of checksum pieces for every element size.
const PIECE: usize = CHECKSUM_PIECE / 2;

/// What the update of a tile needs beside the unit.
pub(crate) struct Update<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) disk: Option<&'a Disk>,
    pub(crate) grad: Dtype,
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
    element: usize,
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
    let base = unit.base;
    let on_disk = unit.weights.on_disk();
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
            let grad = if let Some(read) = gradient {
                read
            } else {
                let kept = unit.grad.bytes();
                let kept = kept.expect("what is not on disk is in memory until its step");
                &kept[byte_range(&range, update.grad.size())]
            };
            (grad, update.grad)
        }
    };
    if let StateBlocks::Host { blocks } = &mut unit.state {
        for (index, (_, lease)) in blocks.iter_mut().enumerate() {
            let tensor = LIVE + 1 + index;
            let bytes = byte_range(&range, tensors.tensors()[tensor].size());
            sources.push(Source::new(tensor, &mut lease[bytes], false, false));
        }
    }
    for (tensor, lease) in buffers {
        let fresh = pristine && tensors.tensors()[*tensor].role == Role::Moment;
        sources.push(Source::new(*tensor, lease, !fresh, true));
    }
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
    }
    let parts = run_all(update.pool, parts, |part| {
        part.run(tensors, segments, grad_dtype);
    });
    verify_gradient(update, gradient, &parts)?;
    checksums(update, tensors, &parts)
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
            grad_checks: None,
        })
        .collect();
    for source in sources {
        let element = tensors.tensors()[source.tensor].size();
        let mut rest = source.bytes;
        for (index, part) in parts.iter_mut().enumerate() {
            // The last part takes all that is left: where frozen weights follow, they belong to the same tile.
            let take = if index + 1 == count {
                rest.len()
            } else {
                (share * element).min(rest.len())
            };
            let (bytes, tail) = std::mem::take(&mut rest).split_at_mut(take);
            rest = tail;
            part.slices.push(Slice {
                tensor: source.tensor,
                element,
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
        self.digest_longer(false);
        while at < self.len {
            let end = (at + PIECE).min(self.len);
            self.digest(at, end, false);
            let piece = self.start + at as u64..self.start + end as u64;
            for segment in segments {
                let start = segment.range.start.max(piece.start);
                let stop = segment.range.end.min(piece.end);
                if start < stop {
                    let local = to_usize(start - self.start)..to_usize(stop - self.start);
                    self.apply(tensors, segment, local, grad_dtype);
                }
            }
            self.digest(at, end, true);
            at = end;
        }
        self.digest_longer(true);
    }

    /// Takes the checksums of elements `start..end` before or after the update.
    fn digest(&mut self, start: usize, end: usize, after: bool) {
        for slice in self
            .slices
            .iter_mut()
            .filter(|slice| slice.bytes.len() == self.len * slice.element)
        {
            slice.digest(start * slice.element..end * slice.element, after);
        }
    }

    /// Takes those of a weight that goes on after the part's last element: frozen elements of the same tile.
    fn digest_longer(&mut self, after: bool) {
        for slice in self
            .slices
            .iter_mut()
            .filter(|slice| slice.bytes.len() != self.len * slice.element)
        {
            slice.digest(0..slice.bytes.len(), after);
        }
    }

    fn apply(
        &mut self,
        tensors: &StateLayout,
        segment: &Segment,
        local: Range<usize>,
        grad_dtype: Dtype,
    ) {
        let bytes = &self.grad[local.start * grad_dtype.size()..local.end * grad_dtype.size()];
        let grad = match grad_dtype {
            Dtype::F32 => Grad::F32(bytemuck::cast_slice(bytes)),
            Dtype::Bf16 => Grad::Bf16(bytemuck::cast_slice(bytes)),
            Dtype::F16 => Grad::F16(bytemuck::cast_slice(bytes)),
        };
        let slices = self
            .slices
            .iter_mut()
            .map(|slice| &mut slice.bytes[local.start * slice.element..local.end * slice.element]);
        zeroxide_optim::update(&segment.step, tensors, slices, grad);
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

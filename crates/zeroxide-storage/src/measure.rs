//! What the disk of a directory can do, measured by the queue that training uses.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use zeroxide_memory::Lease;

use crate::error::StorageError;
use crate::file::DiskFile;
use crate::queue::{Completion, EngineKind, OpKind, Operation, Queue, open_queue};

/// What moved in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Bytes that were transferred.
    pub bytes: u64,
    /// From the first operation to the last answer.
    pub took: Duration,
}

/// What a measurement found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpeed {
    /// The engine of the queue and why it was chosen, in one line.
    pub engine: String,
    /// Whether transfers bypass the page cache; otherwise the figures are the cache's as much as the disk's.
    pub direct: bool,
    /// Into a file whose blocks were only allocated.
    pub write: Pass,
    /// Of what was written.
    pub read: Pass,
}

/// Writes and reads a file of at most `bytes` bytes in `directory`, each for at most about `limit`. The buffers, all of
/// one length, are the requests in flight. The file is gone when this returns.
///
/// # Errors
///
/// As [`DiskFile::create`], [`open_queue`] and every [`Completion`]; [`StorageError::Depth`] without buffers.
pub fn measure_disk(
    directory: &Path,
    bytes: u64,
    limit: Duration,
    mut buffers: Vec<Lease>,
) -> Result<DiskSpeed, StorageError> {
    let block = buffers.first().map_or(0, |buffer| buffer.len() as u64);
    let queue = open_queue(EngineKind::Auto, buffers.len())?;
    for (seed, buffer) in (1_u64..).zip(&mut buffers) {
        fill(buffer, seed);
    }
    let path = directory.join(format!(".zeroxide-measure-{}", std::process::id()));
    let file = DiskFile::create(&path, bytes / block * block)?;
    // Without a name it is gone with this process, however that ends.
    std::fs::remove_file(&path).map_err(|source| StorageError::File {
        action: "remove",
        path: path.clone(),
        source,
    })?;
    let blocks = file.bytes() / block;
    let write = pass(&*queue, &file, OpKind::Write, blocks, limit, &mut buffers)?;
    let written = write.bytes / block;
    let read = pass(&*queue, &file, OpKind::Read, written, limit, &mut buffers)?;
    queue.close();
    Ok(DiskSpeed {
        engine: queue.describe(),
        direct: file.is_direct(),
        write,
        read,
    })
}

/// Moves up to `blocks` blocks from the beginning of the file, keeping every buffer in flight.
fn pass(
    queue: &dyn Queue,
    file: &Arc<DiskFile>,
    kind: OpKind,
    blocks: u64,
    limit: Duration,
    buffers: &mut Vec<Lease>,
) -> Result<Pass, StorageError> {
    let block = buffers.first().map_or(0, |buffer| buffer.len() as u64);
    let (reply, completions) = channel();
    let start = Instant::now();
    let (mut next, mut answered) = (0, 0);
    loop {
        while next < blocks
            && (next == 0 || start.elapsed() < limit)
            && let Some(buffer) = buffers.pop()
        {
            let operation = Operation {
                kind,
                file: Arc::clone(file),
                offset: next * block,
                buffer,
                tag: next,
                unit: None,
                reply: reply.clone().into(),
            };
            queue.submit(operation).map_err(|(error, _)| error)?;
            next += 1;
        }
        if answered == next {
            break;
        }
        let Completion { buffer, result, .. } =
            completions.recv().map_err(|_| StorageError::Closed)?;
        result?;
        buffers.push(buffer);
        answered += 1;
    }
    Ok(Pass {
        bytes: answered * block,
        took: start.elapsed(),
    })
}

/// Bytes that no file system compresses (xorshift64).
fn fill(buffer: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in buffer.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
}

//! Throughput of the I/O queue, one JSON line per direction.
//!
//! ```text
//! cargo run --release --example queue_bench -- --directory /mnt/nvme --engine io_uring \
//!     --bytes 1073741824 --block 1048576 --depth 32 --repeat 3
//! ```
//!
//! Writes a file block by block with `depth` blocks in flight, then reads it back, `repeat` times. The
//! figures compare with `fio --direct=1 --bs=BLOCK --iodepth=DEPTH`.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_storage::{
    Completion, DiskFile, EngineKind, OpKind, Operation, Queue, checksum, open_queue,
};

struct Options {
    directory: PathBuf,
    engine: EngineKind,
    bytes: u64,
    block: usize,
    depth: usize,
    repeat: usize,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        directory: std::env::temp_dir(),
        engine: EngineKind::Auto,
        bytes: 1 << 30,
        block: 1 << 20,
        depth: 32,
        repeat: 3,
    };
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--directory" => options.directory = value.into(),
            "--engine" => {
                options.engine = match value.as_str() {
                    "auto" => EngineKind::Auto,
                    "io_uring" => EngineKind::IoUring,
                    "threads" => EngineKind::Threads,
                    _ => return Err(format!("no engine {value}: auto, io_uring, threads").into()),
                }
            }
            "--bytes" => options.bytes = value.parse()?,
            "--block" => options.block = value.parse()?,
            "--depth" => options.depth = value.parse()?,
            "--repeat" => options.repeat = value.parse()?,
            _ => return Err(format!("no option {name}").into()),
        }
    }
    Ok(options)
}

/// Moves the whole file once, keeping every buffer in flight; returns seconds.
fn pass(
    queue: &dyn Queue,
    file: &Arc<DiskFile>,
    kind: OpKind,
    buffers: &mut Vec<Lease>,
    block: usize,
) -> Result<f64, Box<dyn Error>> {
    let (reply, completions) = channel();
    let start = Instant::now();
    let blocks = file.bytes() / block as u64;
    let (mut next, mut answered) = (0, 0);
    while answered < blocks {
        while next < blocks
            && let Some(buffer) = buffers.pop()
        {
            let operation = Operation {
                kind,
                file: Arc::clone(file),
                offset: next * block as u64,
                buffer,
                tag: next,
                unit: None,
                reply: reply.clone().into(),
            };
            queue.submit(operation).map_err(|(error, _)| error)?;
            next += 1;
        }
        let Completion { buffer, result, .. } = completions.recv()?;
        result?;
        buffers.push(buffer);
        answered += 1;
    }
    Ok(start.elapsed().as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "sizes below 2^53 bytes")]
fn main() -> Result<(), Box<dyn Error>> {
    let Options {
        directory,
        engine,
        bytes,
        block,
        depth,
        repeat,
    } = options()?;
    let bytes = bytes / block as u64 * block as u64;
    let queue = open_queue(engine, depth)?;
    let path = directory.join(format!("queue-bench-{}.bin", std::process::id()));
    let file = DiskFile::create(&path, bytes)?;
    let arena = Arena::new(&Budget::new(None), Bucket::Staging, block * depth)?;
    let mut buffers = Vec::with_capacity(depth);
    for index in 0..depth {
        let mut buffer = arena.lease(block, 4096)?;
        for (byte, value) in buffer.iter_mut().zip((index as u64 * 7919)..) {
            *byte = value.to_le_bytes()[0] ^ value.to_le_bytes()[1];
        }
        buffers.push(buffer);
    }
    let mut out = std::io::stdout();
    for round in 0..repeat {
        for kind in [OpKind::Write, OpKind::Read] {
            let seconds = pass(&*queue, &file, kind, &mut buffers, block)?;
            let line = serde_json::json!({
                "op": kind.to_string(), "round": round, "engine": queue.describe(),
                "direct": file.is_direct(), "bytes": bytes, "block": block, "depth": depth,
                "seconds": seconds, "gb_per_s": bytes as f64 / seconds / 1e9,
            });
            writeln!(out, "{line}")?;
        }
    }
    if let Some(buffer) = buffers.first() {
        let start = Instant::now();
        let rounds = 64;
        let sum = (0..rounds).fold(0, |sum, _| sum ^ checksum(std::hint::black_box(buffer)));
        let rate = (block * rounds) as f64 / start.elapsed().as_secs_f64() / 1e9;
        writeln!(
            out,
            "{}",
            serde_json::json!({"op": "checksum", "gb_per_s": rate, "sum": sum})
        )?;
    }
    queue.close();
    std::fs::remove_file(path)?;
    Ok(())
}

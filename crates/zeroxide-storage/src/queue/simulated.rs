//! The simulated engine: a disk with seeded delays, reordering, and faults.
//!
//! One thread serves everything, faults strike by number or place, and random choices come from the seed;
//! only what has been submitted by when is up to the caller's timing. Transfers pass through the same bookkeeping as on the real engines: what is simulated is the system
//! call, not its handling.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use zeroxide_memory::Recorder;

use super::counters::IoCounters;
use super::inbox::{CloseOnExit, Inbox, Waited};
use super::journal::{Journal, JournalEntry};
use super::operation::{OpKind, Operation};
use super::threads::move_piece;
use super::transfer::{Piece, SECTOR, Step, Transfer};
use super::{Queue, StorageError};
use crate::file::DiskFile;

/// What the buffer of a read holds until the read completes, so that reading too early shows.
const POISON: u8 = 0xa5;

/// How a simulated disk behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct SimOptions {
    /// Seed of every random choice.
    pub seed: u64,
    /// Where the bytes go.
    pub backing: SimBacking,
    /// Each piece of a transfer takes a time from this range.
    pub latency: Range<Duration>,
    /// Whether pieces in flight end in a random order rather than the order of their due times.
    pub reorder: bool,
    /// Of the pieces of more than 4096 bytes, this share moves only a part (a multiple of 4096 bytes).
    pub short_share: f64,
    /// Faults, the first that matches a piece applies.
    pub faults: Vec<FaultRule>,
    /// Syncs that fail: (number, counted from zero, error number).
    pub sync_faults: Vec<(u64, i32)>,
    /// Where every act on the disk is noted, for tests of what a power cut may leave.
    pub journal: Option<Journal>,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            backing: SimBacking::Files,
            latency: Duration::ZERO..Duration::ZERO,
            reorder: false,
            short_share: 0.0,
            faults: Vec::new(),
            sync_faults: Vec::new(),
            journal: None,
        }
    }
}

/// Where the bytes of a simulated disk go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimBacking {
    /// Into the files themselves.
    Files,
    /// Into memory, by path; the files keep their preallocated size but are not touched.
    Memory,
}

/// A fault and when it strikes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultRule {
    /// Strikes only this direction, or both without one.
    pub kind: Option<OpKind>,
    /// Which pieces it strikes.
    pub when: Trigger,
    /// What happens.
    pub fault: Fault,
}

/// Which pieces a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The piece with this number, counted from zero over the pieces of the rule's direction.
    Nth(u64),
    /// This piece and all after it.
    From(u64),
    /// Every piece that covers this byte of its file.
    Offset(u64),
}

/// What a fault does to a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Fails with this error number, such as `EIO` (5), `ENOSPC` (28), or `EINTR` (4).
    Errno(i32),
    /// Moves only this many bytes and says so.
    Short(usize),
    /// Writes only this many bytes and says that all were written, as power loss does.
    Torn(usize),
    /// Flips one bit of the first byte on its way, and says nothing.
    FlipBit,
    /// The engine thread panics.
    Panic,
}

/// A queue served by a simulated disk.
pub(super) struct SimulatedQueue {
    inbox: Arc<Inbox>,
    thread: Mutex<Option<JoinHandle<()>>>,
    description: String,
    syncs: AtomicU64,
    sync_faults: Vec<(u64, i32)>,
    journal: Option<Journal>,
}

impl SimulatedQueue {
    /// Starts the engine thread with at most `depth` transfers in flight.
    pub(super) fn open(
        options: SimOptions,
        depth: usize,
        recorder: Recorder,
    ) -> Result<Self, StorageError> {
        let inbox = Inbox::new(recorder);
        let description = format!(
            "simulated, depth {depth}, seed {}, {} faults",
            options.seed,
            options.faults.len()
        );
        let (sync_faults, journal) = (options.sync_faults.clone(), options.journal.clone());
        let thread = {
            let inbox = Arc::clone(&inbox);
            thread::Builder::new()
                .name("zx-io-sim".into())
                .spawn(move || {
                    let _guard = CloseOnExit(Arc::clone(&inbox));
                    Disk::new(options).serve(&inbox, depth);
                })
                .map_err(|source| StorageError::Engine { source })?
        };
        Ok(Self {
            inbox,
            thread: Mutex::new(Some(thread)),
            description,
            syncs: AtomicU64::new(0),
            sync_faults,
            journal,
        })
    }
}

impl Queue for SimulatedQueue {
    fn submit(&self, operation: Operation) -> Result<(), (StorageError, Operation)> {
        self.inbox.push(operation).map(|_| ())
    }

    fn counters(&self) -> IoCounters {
        self.inbox.counters()
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn sync(&self, file: &DiskFile) -> Result<(), StorageError> {
        let number = self.syncs.fetch_add(1, Ordering::Relaxed);
        let fault = self.sync_faults.iter().find(|(nth, _)| *nth == number);
        if let Some((_, errno)) = fault {
            return Err(StorageError::File {
                action: "sync",
                path: file.path().to_path_buf(),
                source: io::Error::from_raw_os_error(*errno),
            });
        }
        if let Some(journal) = &self.journal {
            journal.note(JournalEntry::Sync {
                path: file.path().to_path_buf(),
            });
        }
        file.sync()
    }

    fn journal(&self) -> Option<&Journal> {
        self.journal.as_ref()
    }

    fn close(&self) {
        if self.inbox.guard().is_forked() {
            return;
        }
        self.inbox.close();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of the thread has answered every transfer already.
            let _ = thread.join();
        }
    }
}

impl Drop for SimulatedQueue {
    fn drop(&mut self) {
        if self.inbox.guard().is_forked() {
            // The thread stayed behind in the parent: neither joining nor detaching means anything.
            let thread = self
                .thread
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::forget(thread.take());
        } else {
            self.close();
        }
    }
}

/// A piece that the simulated device works on.
struct Pending {
    transfer: Transfer,
    due: Instant,
}

/// The simulated device, on its thread.
struct Disk {
    options: SimOptions,
    random: SplitMix,
    memory: HashMap<PathBuf, Vec<u8>>,
    pieces_read: u64,
    pieces_written: u64,
}

impl Disk {
    fn new(options: SimOptions) -> Self {
        Self {
            random: SplitMix(options.seed),
            options,
            memory: HashMap::new(),
            pieces_read: 0,
            pieces_written: 0,
        }
    }

    /// Serves transfers until the inbox is closed and nothing is in flight.
    fn serve(&mut self, inbox: &Inbox, depth: usize) {
        let mut pending: Vec<Pending> = Vec::with_capacity(depth);
        let mut open = true;
        while open || !pending.is_empty() {
            let next_due = pending.iter().map(|piece| piece.due).min();
            let limit = next_due.map(|due| due.saturating_duration_since(Instant::now()));
            if open && pending.len() < depth {
                match inbox.wait(limit) {
                    Waited::Transfer(transfer) => {
                        self.begin(transfer, &mut pending);
                        continue;
                    }
                    Waited::Nothing => {}
                    Waited::Closed => {
                        open = false;
                        continue;
                    }
                }
            } else if let Some(limit) = limit {
                thread::sleep(limit);
            }
            if let Some(index) = self.choose(&pending) {
                let piece = pending.swap_remove(index);
                self.end(piece.transfer, &mut pending);
            }
        }
    }

    fn begin(&mut self, mut transfer: Transfer, pending: &mut Vec<Pending>) {
        let piece = transfer.piece();
        if piece.kind == OpKind::Read {
            piece.buffer.fill(POISON);
        }
        let Range { start, end } = self.options.latency;
        let latency = start + end.saturating_sub(start).mul_f64(self.random.unit());
        pending.push(Pending {
            transfer,
            due: Instant::now() + latency,
        });
    }

    /// The piece that ends next, if any is due.
    fn choose(&mut self, pending: &[Pending]) -> Option<usize> {
        let now = Instant::now();
        let due: Vec<usize> = (0..pending.len())
            .filter(|i| pending[*i].due <= now)
            .collect();
        if self.options.reorder {
            due.get(self.random.below(due.len())).copied()
        } else {
            due.into_iter().min_by_key(|index| pending[*index].due)
        }
    }

    fn end(&mut self, mut transfer: Transfer, pending: &mut Vec<Pending>) {
        let outcome = self.perform(transfer.piece());
        match transfer.absorb(outcome) {
            Step::Again => self.begin(transfer, pending),
            Step::Finished(result) => transfer.finish(result),
        }
    }

    /// The simulated system call.
    fn perform(&mut self, piece: Piece<'_>) -> io::Result<usize> {
        let count = match piece.kind {
            OpKind::Read => &mut self.pieces_read,
            OpKind::Write => &mut self.pieces_written,
        };
        *count += 1;
        let total = self.pieces_read + self.pieces_written - 1;
        let of_kind = match piece.kind {
            OpKind::Read => self.pieces_read,
            OpKind::Write => self.pieces_written,
        } - 1;
        if piece.file.is_direct() && !piece.offset.is_multiple_of(SECTOR as u64) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let end = piece.offset + piece.buffer.len() as u64;
        let fault = self.options.faults.iter().find(|rule| {
            let number = if rule.kind.is_some() { of_kind } else { total };
            rule.kind.is_none_or(|kind| kind == piece.kind)
                && match rule.when {
                    Trigger::Nth(n) => number == n,
                    Trigger::From(n) => number >= n,
                    Trigger::Offset(byte) => (piece.offset..end).contains(&byte),
                }
        });
        let length = piece.buffer.len();
        match fault.map(|rule| rule.fault) {
            None => {
                let moved = self.piece_length(length);
                self.access(shorten(piece, moved))
            }
            Some(Fault::Errno(number)) => Err(io::Error::from_raw_os_error(number)),
            Some(Fault::Short(bytes)) => self.access(shorten(piece, bytes.min(length))),
            Some(Fault::Torn(bytes)) => {
                self.access_all(shorten(piece, bytes.min(length)))?;
                Ok(length)
            }
            Some(Fault::FlipBit) => self.flip(piece),
            Some(Fault::Panic) => panic!("a simulated fault of the engine thread"),
        }
    }

    /// How much of a piece without a fault is moved.
    fn piece_length(&mut self, length: usize) -> usize {
        let pages = length / 4096;
        if pages > 1 && self.random.unit() < self.options.short_share {
            4096 * (1 + self.random.below(pages - 1))
        } else {
            length
        }
    }

    fn flip(&mut self, piece: Piece<'_>) -> io::Result<usize> {
        let Piece {
            kind,
            file,
            offset,
            buffer,
        } = piece;
        if kind == OpKind::Write {
            // The buffer is changed only on its way to the disk: its owner gets it back as it was.
            buffer[0] ^= 1;
        }
        let outcome = self.access(Piece {
            kind,
            file,
            offset,
            buffer: &mut *buffer,
        });
        buffer[0] ^= 1;
        outcome
    }

    fn access_all(&mut self, piece: Piece<'_>) -> io::Result<()> {
        if piece.buffer.is_empty() {
            return Ok(());
        }
        self.access(piece).map(|_| ())
    }

    fn access(&mut self, mut piece: Piece<'_>) -> io::Result<usize> {
        if let (Some(journal), OpKind::Write) = (&self.options.journal, piece.kind) {
            journal.note(JournalEntry::Write {
                path: piece.file.path().to_path_buf(),
                offset: piece.offset,
                bytes: piece.buffer.to_vec(),
            });
        }
        match self.options.backing {
            SimBacking::Files => move_piece(&mut piece),
            SimBacking::Memory => {
                let path = piece.file.path().to_path_buf();
                let contents = self.memory.entry(path).or_default();
                // A file whose bytes do not fit an address space cannot be simulated in memory.
                let start = usize::try_from(piece.offset)
                    .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
                let end = start + piece.buffer.len();
                if contents.len() < end {
                    contents.resize(end, 0);
                }
                match piece.kind {
                    OpKind::Read => piece.buffer.copy_from_slice(&contents[start..end]),
                    OpKind::Write => contents[start..end].copy_from_slice(piece.buffer),
                }
                Ok(piece.buffer.len())
            }
        }
    }
}

/// The first `bytes` bytes of a piece.
fn shorten(piece: Piece<'_>, bytes: usize) -> Piece<'_> {
    let Piece {
        kind,
        file,
        offset,
        buffer,
    } = piece;
    Piece {
        kind,
        file,
        offset,
        buffer: &mut buffer[..bytes],
    }
}

/// The `SplitMix64` generator of Steele, Lea, and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in zero to one, one excluded.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64 exactly")]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Below `bound`, or zero when `bound` is zero.
    fn below(&mut self, bound: usize) -> usize {
        let bound = (bound as u64).max(1);
        usize::try_from(self.next() % bound).unwrap_or(0)
    }
}

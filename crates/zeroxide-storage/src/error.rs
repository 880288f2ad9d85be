//! Everything that can go wrong between a buffer and the disk.

use std::fmt;
use std::io;
use std::path::PathBuf;

use zeroxide_layout::BlockId;
use zeroxide_memory::Forked;

use crate::queue::OpKind;

/// An error of the storage tier. Every variant names the file or directory and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A path that must be a directory is something else.
    #[error("{} is not a directory; give a directory for offloaded state", path.display())]
    NotADirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// The directory that should hold the scratch directory does not exist.
    #[error("cannot create {}: {} does not exist; create it first", path.display(), missing.display())]
    MissingParent {
        /// The path as given.
        path: PathBuf,
        /// The part of it that is missing.
        missing: PathBuf,
    },
    /// The directory cannot be written to: a read-only file system or missing permission.
    #[error("{} is not writable: {source}; choose a directory this user can write to", path.display())]
    ReadOnly {
        /// The path that was to be created or written.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file system has not enough room.
    #[error("no space for {}: {need} bytes needed, {free} bytes free; free some space or choose another directory", path.display())]
    NoSpace {
        /// The file that was to grow or be written.
        path: PathBuf,
        /// Bytes needed.
        need: u64,
        /// Bytes that an unprivileged process could still allocate there.
        free: u64,
    },
    /// Another run holds the scratch directory.
    #[error("{} is already in use by {holder}; wait for it to end or choose another directory or job name", path.display())]
    InUse {
        /// The scratch directory.
        path: PathBuf,
        /// Who holds it.
        holder: Holder,
    },
    /// The scratch directory exists, is not empty, and was not made by a block store.
    #[error("{} exists and is not a scratch directory; choose another directory or job name", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
    },
    /// The same directory was given twice.
    #[error("directory {} is listed twice; list each directory once", path.display())]
    DuplicateDirectory {
        /// The directory as given the second time.
        path: PathBuf,
    },
    /// Shares that are not one positive number for each directory.
    #[error("{got} shares for {expected} directories; give each directory one above 0, or none")]
    Shares {
        /// How many directories there are.
        expected: usize,
        /// How many shares there are.
        got: usize,
    },
    /// A job name that cannot be one directory name.
    #[error("job name {job:?} cannot be a directory name: {reason}")]
    JobName {
        /// The name as given.
        job: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A list of blocks that cannot be laid out.
    #[error("cannot lay out block {block}: {reason}")]
    Layout {
        /// The offending block.
        block: BlockId,
        /// What is wrong with it.
        reason: String,
    },
    /// A system call on a file or directory failed outside a transfer.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was being done, a verb such as `open`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A transfer failed.
    #[error("{op} of {length} bytes at offset {offset} of {} failed after {done} bytes: {source}", path.display())]
    Io {
        /// Whether it was a read or a write.
        op: OpKind,
        /// The file.
        path: PathBuf,
        /// Where the transfer began in the file, in bytes.
        offset: u64,
        /// How many bytes it was to move.
        length: usize,
        /// How many bytes had moved before the error.
        done: usize,
        /// What the operating system said.
        source: io::Error,
    },
    /// A transfer stopped early and made no further progress, as at the end of a truncated file.
    #[error("{op} at offset {offset} of {} moved {got} of {expected} bytes; the file may have been truncated", path.display())]
    ShortTransfer {
        /// Whether it was a read or a write.
        op: OpKind,
        /// The file.
        path: PathBuf,
        /// Where the transfer began in the file, in bytes.
        offset: u64,
        /// Bytes that were to move.
        expected: usize,
        /// Bytes that did move.
        got: usize,
    },
    /// An operation reaches outside its file, or is empty.
    #[error("{op} of {length} bytes at offset {offset} lies outside {} of {bytes} bytes", path.display())]
    OutOfRange {
        /// Whether it was a read or a write.
        op: OpKind,
        /// The file.
        path: PathBuf,
        /// First byte of the operation.
        offset: u64,
        /// Length of the operation in bytes.
        length: usize,
        /// Size of the file in bytes.
        bytes: u64,
    },
    /// An operation on a file opened for direct I/O is not aligned.
    #[error("{op} of {length} bytes at offset {offset} of {} from address {address:#x}: direct I/O needs all three in multiples of {align}", path.display())]
    Misaligned {
        /// Whether it was a read or a write.
        op: OpKind,
        /// The file.
        path: PathBuf,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Length of the operation in bytes.
        length: usize,
        /// Address of the buffer.
        address: usize,
        /// The alignment required, in bytes.
        align: usize,
    },
    /// A tile that came back from disk is not what was written.
    #[error("tile {tile} of {block} at offset {offset} of {} is corrupt: checksum {expected:016x} was written, {got:016x} came back; the disk or its path is faulty", path.display())]
    Corrupt {
        /// The file that holds the tile.
        path: PathBuf,
        /// The block.
        block: BlockId,
        /// Index of the tile in the block.
        tile: u32,
        /// Offset of the tile in the file, in bytes.
        offset: u64,
        /// CRC-64/NVME of what was written.
        expected: u64,
        /// CRC-64/NVME of what came back.
        got: u64,
    },
    /// A tile was asked for before anything was written to it.
    #[error("tile {tile} of {block} was never written to {}", path.display())]
    NeverWritten {
        /// The file that holds the tile.
        path: PathBuf,
        /// The block.
        block: BlockId,
        /// Index of the tile in the block.
        tile: u32,
    },
    /// The store has no such block or tile.
    #[error("the block store has no tile {tile} of {block}; the block has {tiles} tiles")]
    UnknownTile {
        /// The block asked for.
        block: BlockId,
        /// The tile asked for.
        tile: u32,
        /// How many tiles the block has, zero when there is no such block.
        tiles: u32,
    },
    /// A buffer has not the length of its tile.
    #[error("tile {tile} of {block} has {expected} bytes, the buffer has {got}")]
    TileLength {
        /// The block.
        block: BlockId,
        /// Index of the tile in the block.
        tile: u32,
        /// Length of the tile in bytes.
        expected: usize,
        /// Length of the buffer in bytes.
        got: usize,
    },
    /// A store header cannot be understood.
    #[error("header {} is not usable: {reason}", path.display())]
    Header {
        /// The header file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A durable store was left by a run that this one cannot continue.
    #[error("{} was left by a run with {difference}; continue it as it was, choose another durable_name, or remove the \
             directory to start anew", path.display())]
    OtherRun {
        /// The directory of the store.
        path: PathBuf,
        /// What is different.
        difference: Box<Difference>,
    },
    /// The data of a commit are not there.
    #[error("{} has the manifest of a commit, but its data are gone: {reason}; restore the file, or remove the directory \
             to start anew", path.display())]
    DataGone {
        /// The directory of the store.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A store is in a state that does not allow the call: a mistake in the caller's code.
    #[error("{call} of the store in {}: {reason}", path.display())]
    Commit {
        /// The call.
        call: &'static str,
        /// The directory of the store.
        path: PathBuf,
        /// What is in the way.
        reason: &'static str,
    },
    /// The queue was closed before the operation ran, or its engine has stopped.
    #[error("the I/O queue is closed")]
    Closed,
    /// A queue or store made in one process was used in a forked child.
    #[error(
        "made in process {created} but used in its forked child {current}; open a new one in the child"
    )]
    Forked {
        /// The process that made it.
        created: u32,
        /// The process that used it.
        current: u32,
    },
    /// The kernel or its policy does not allow `io_uring`.
    #[error("io_uring is not available: {reason}; use the thread engine")]
    IoUringRefused {
        /// What was tried and what the kernel said.
        reason: String,
    },
    /// A queue depth out of range.
    #[error("queue depth {depth} is out of range; give 1 to {max}")]
    Depth {
        /// The depth as given.
        depth: usize,
        /// The greatest depth allowed.
        max: usize,
    },
    /// An engine thread could not be started or its engine could not be set up.
    #[error("cannot start the I/O engine: {source}")]
    Engine {
        /// What the operating system said.
        source: io::Error,
    },
}

impl From<Forked> for StorageError {
    fn from(Forked { created, current }: Forked) -> Self {
        Self::Forked { created, current }
    }
}

/// Something in which one run is not like another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What it is.
    pub what: String,
    /// What the other run had.
    pub found: String,
    /// What this one has.
    pub wanted: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, found, wanted) = (&self.what, &self.found, &self.wanted);
        write!(f, "{what} {found}, and this one has {wanted}")
    }
}

/// Who holds the lock of a scratch directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// A live run.
    Run {
        /// Its process id.
        pid: u32,
    },
    /// The run that took the lock is gone, but a process forked from it still has it open.
    Orphan {
        /// The process id of the run that is gone.
        pid: u32,
    },
    /// The holder has not written its process id.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run { pid } => write!(f, "live run pid {pid}"),
            Self::Orphan { pid } => {
                write!(f, "a process left behind by run pid {pid}, which has ended")
            }
            Self::Unknown => write!(f, "another live run"),
        }
    }
}

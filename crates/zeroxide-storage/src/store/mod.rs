//! The block store: preallocated, checksummed tiles of training state in one or more directories.
//!
//! ```text
//! <directory>/<job>/LOCK        locked while the run lives; names it
//!                   header      whose it is and the block table, checksummed, replaced by rename
//!                   blocks.bin  the tiles, each at a fixed offset that is a multiple of 4096
//!                   manifest-*  the last commit of a durable store, in its first directory
//! ```
//!
//! The data is scratch: it belongs to the run that made it. What a dead run left under the same job
//! name is taken over and overwritten; a live run's directory is refused. A durable store (`commit.rs`) has two
//! places for each tile, and what a dead run left is what its last commit says.

mod checksums;
mod commit;
#[cfg(test)]
mod fuzzed;
mod header;
mod lock;
mod manifest;
mod placement;
mod publish;
mod scratch;
mod sealed;
mod speculation;
mod versions;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroxide_layout::BlockId;
use zeroxide_memory::{ForkGuard, Lease};

use crate::error::StorageError;
use crate::file::DiskFile;
use crate::queue::{OpKind, Operation, Queue, Reply};

pub use checksums::{CHECKSUM_PIECE, RunningChecksum, checksum, join_checksums};
pub use commit::{Commit, Durable, Pin};
pub use placement::BlockSpec;

use commit::Commits;
use header::Header;
use placement::{Home, Placement, shares_of};
use scratch::Scratch;
use versions::{Version, Versions};

/// What a store is made of.
pub struct StoreOptions {
    /// The directories over which tiles are striped; a missing one is made if its parent exists.
    pub directories: Vec<PathBuf>,
    /// How fast each directory's disk is beside the others, by which they get their parts: a positive number each. Empty
    /// for disks that are alike. A durable store that is opened again keeps those it was made with.
    pub shares: Vec<u64>,
    /// Name of the scratch directory in each of them; unique among the runs that share a directory.
    pub job: String,
    /// The blocks to hold.
    pub blocks: Vec<BlockSpec>,
    /// What moves the bytes.
    pub queue: Arc<dyn Queue>,
    /// Whether the scratch directories are removed when the store is closed or dropped. Those of a durable store stay.
    pub ephemeral: bool,
    /// Whether tiles have a second place, so that what is written can be taken back; not of a durable store.
    pub spare: bool,
    /// What a store needs to survive its process; `None` for one that does not.
    pub durable: Option<Durable>,
}

/// Stores blocks tile by tile.
///
/// Reads and writes go through the queue and are answered on the channel given with each. The store
/// keeps the checksum of what was last handed over for each tile; whoever receives a tile compares it
/// with [`verify`](Self::verify), on the thread of its choice. A tile that is being written is not read
/// before its completion: that order is the caller's to keep.
///
/// Dropping a store releases its directories as [`close`](Self::close) does, ignoring errors.
pub struct BlockStore {
    queue: Arc<dyn Queue>,
    placement: Placement,
    versions: Versions,
    files: Vec<Arc<DiskFile>>,
    /// The header of the first directory; those of the others differ in their number.
    header: Header,
    /// Present in a durable store.
    commits: Option<Commits>,
    /// Tiles have a second place that no commit takes.
    spare: bool,
    scratch: Vec<Scratch>,
    release: Release,
    guard: ForkGuard,
}

/// What is still to be done with the scratch directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Release {
    /// Remove them.
    Remove,
    /// Leave them where they are.
    Keep,
}

impl BlockStore {
    /// Makes the scratch directories, locks them, and preallocates room for all blocks: twice in a durable store,
    /// and in one that has places to spare.
    /// Nothing is left behind when that fails.
    ///
    /// A durable store that has been committed to before is opened instead, and changes nothing of it.
    ///
    /// # Errors
    ///
    /// Each names the path or block at fault: [`StorageError::JobName`], [`StorageError::Layout`],
    /// [`StorageError::DuplicateDirectory`], [`StorageError::Shares`], [`StorageError::NotADirectory`],
    /// [`StorageError::MissingParent`], [`StorageError::ReadOnly`], [`StorageError::Foreign`],
    /// [`StorageError::InUse`], [`StorageError::NoSpace`], [`StorageError::File`]; of a durable store also
    /// [`StorageError::OtherRun`], [`StorageError::DataGone`], [`StorageError::Header`].
    pub fn create(options: StoreOptions) -> Result<Self, StorageError> {
        let StoreOptions {
            directories,
            shares,
            job,
            blocks,
            queue,
            ephemeral,
            spare,
            durable,
        } = options;
        check_job(&job)?;
        let shares = match directories.first() {
            // What is there lies where it was put, whatever a disk is worth today.
            Some(root) if durable.is_some() && commit::is_committed(&root.join(&job))? => {
                let made = Header::read(&root.join(&job))?;
                if made.directories == directories.len() {
                    made.shares
                } else {
                    Vec::new()
                }
            }
            _ => shares,
        };
        let placement = Placement::new(&blocks, &shares_of(&shares, directories.len())?)?;
        let kept = durable.is_some() || !ephemeral;
        let mut store = Self {
            queue,
            versions: Versions::new(placement.committed()),
            placement,
            files: Vec::with_capacity(directories.len()),
            header: Header {
                directory: 0,
                directories: directories.len(),
                shares,
                facts: durable
                    .as_ref()
                    .map_or_else(Vec::new, |it| it.facts.clone()),
                blocks: blocks.iter().map(Into::into).collect(),
            },
            commits: None,
            spare,
            scratch: Vec::with_capacity(directories.len()),
            // Until the store is complete, dropping it must leave nothing behind.
            release: Release::Remove,
            guard: ForkGuard::new(),
        };
        let mut seen = Vec::with_capacity(directories.len());
        for root in &directories {
            let canonical = root.canonicalize().unwrap_or_else(|_| root.clone());
            if seen.contains(&canonical) {
                return Err(StorageError::DuplicateDirectory { path: root.clone() });
            }
            seen.push(canonical);
            let existing = root.join(&job);
            if durable.is_some() && commit::is_committed(&existing)? {
                // Before the lock is tried: whatever comes now, what was committed stays.
                store.release = Release::Keep;
            }
            store.scratch.push(Scratch::open(root, &job, !kept)?);
        }
        if durable.is_some() {
            store.open_commits()?;
        } else {
            store.allocate(if spare { 2 } else { 1 })?;
        }
        store.release = if kept { Release::Keep } else { Release::Remove };
        Ok(store)
    }

    /// Preallocates room for `slots` versions of every tile that commits name and one of the others, and says in the
    /// headers what is there.
    fn allocate(&mut self, slots: u64) -> Result<(), StorageError> {
        for (scratch, bytes) in self.scratch.iter().zip(self.placement.bytes(slots)) {
            self.files.push(scratch.allocate(bytes)?);
        }
        self.write_headers()
    }

    /// Starts reading a tile into `buffer`; the completion carries `tag`.
    ///
    /// # Errors
    ///
    /// The buffer comes back with [`StorageError::UnknownTile`], [`StorageError::TileLength`],
    /// [`StorageError::NeverWritten`], or what the queue says.
    pub fn start_read(
        &self,
        block: BlockId,
        tile: u32,
        buffer: Lease,
        tag: u64,
        reply: impl Into<Reply>,
    ) -> Result<(), (StorageError, Lease)> {
        let (index, home) = match self.locate(block, tile, buffer.len()) {
            Ok(located) => located,
            Err(error) => return Err((error, buffer)),
        };
        let Some(version) = self.versions.newest(index) else {
            return Err((self.never_written(block, tile, home), buffer));
        };
        let home = self.place(home, version);
        self.submit(OpKind::Read, block, home, buffer, tag, reply)
    }

    /// Starts writing `buffer` to a tile, after taking its checksum on the calling thread; the
    /// completion carries `tag`. After a failed write the tile does not verify.
    ///
    /// # Errors
    ///
    /// The buffer comes back with [`StorageError::UnknownTile`], [`StorageError::TileLength`], or what
    /// the queue says; the tile is then as it was.
    pub fn start_write(
        &self,
        block: BlockId,
        tile: u32,
        buffer: Lease,
        tag: u64,
        reply: impl Into<Reply>,
    ) -> Result<(), (StorageError, Lease)> {
        let crc = checksum(&buffer);
        self.start_write_with_crc(block, tile, buffer, crc, tag, reply)
    }

    /// As [`start_write`](Self::start_write), with the [`checksum`] of the buffer taken before.
    ///
    /// # Errors
    ///
    /// As [`start_write`](Self::start_write).
    pub fn start_write_with_crc(
        &self,
        block: BlockId,
        tile: u32,
        buffer: Lease,
        crc: u64,
        tag: u64,
        reply: impl Into<Reply>,
    ) -> Result<(), (StorageError, Lease)> {
        let (index, home) = match self.locate(block, tile, buffer.len()) {
            Ok(located) => located,
            Err(error) => return Err((error, buffer)),
        };
        if let Err(error) = self.check_writable() {
            return Err((error, buffer));
        }
        // Noted before the operation starts, since its completion may be acted on at once.
        let (version, before) = self.versions.begin(index, crc);
        let home = self.place(home, version);
        let outcome = self.submit(OpKind::Write, block, home, buffer, tag, reply);
        if outcome.is_err() {
            self.versions.restore(index, before);
        }
        outcome
    }

    /// Compares a tile that was read with what was last written there.
    ///
    /// # Errors
    ///
    /// [`StorageError::Corrupt`] with both checksums when they differ, [`StorageError::UnknownTile`],
    /// [`StorageError::TileLength`], [`StorageError::NeverWritten`].
    pub fn verify(&self, block: BlockId, tile: u32, bytes: &[u8]) -> Result<(), StorageError> {
        let (index, home) = self.locate(block, tile, bytes.len())?;
        let Some(expected) = self.versions.newest(index) else {
            return Err(self.never_written(block, tile, home));
        };
        self.compare(block, tile, home, expected, checksum(bytes))
    }

    /// As [`verify`](Self::verify), for a tile whose [`checksum`] was taken by the caller.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn verify_checksum(&self, block: BlockId, tile: u32, got: u64) -> Result<(), StorageError> {
        self.guard.check_process()?;
        let (index, home) = self.placement.find(block, tile)?;
        let Some(expected) = self.versions.newest(index) else {
            return Err(self.never_written(block, tile, home));
        };
        self.compare(block, tile, home, expected, got)
    }

    fn compare(
        &self,
        block: BlockId,
        tile: u32,
        home: Home,
        expected: Version,
        got: u64,
    ) -> Result<(), StorageError> {
        if got == expected.crc {
            return Ok(());
        }
        let home = self.place(home, expected);
        let path = self.file(home).path().to_path_buf();
        Err(StorageError::Corrupt {
            path,
            block,
            tile,
            offset: home.offset,
            expected: expected.crc,
            got,
        })
    }

    /// Where a version of a tile lies in the file of its directory.
    fn place(&self, home: Home, version: Version) -> Home {
        Home {
            offset: self.placement.offset(home, version.slot),
            ..home
        }
    }

    /// How many tiles a block has; zero for a block the store does not hold.
    pub fn tiles(&self, block: BlockId) -> u32 {
        self.placement.tiles(block).unwrap_or(0)
    }

    /// Length of a tile in bytes.
    ///
    /// # Errors
    ///
    /// [`StorageError::UnknownTile`] when the store has no such tile.
    pub fn tile_len(&self, block: BlockId, tile: u32) -> Result<usize, StorageError> {
        self.placement
            .find(block, tile)
            .map(|(_, home)| home.length)
    }

    /// Bytes preallocated over all directories.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes()).sum()
    }

    /// The data files, one for each directory.
    pub fn files(&self) -> &[Arc<DiskFile>] {
        &self.files
    }

    /// The scratch directories, `<directory>/<job>` for each directory.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.scratch.iter().map(Scratch::path)
    }

    /// What the user should be told about the making of this store, a line each: directories of dead
    /// runs that were taken over, file systems without direct I/O.
    pub fn notes(&self) -> Vec<String> {
        let discarded = self.commits.as_ref().is_none_or(|it| it.found().is_empty());
        let takeovers = self.scratch.iter().filter_map(Scratch::note);
        let takeovers = takeovers.filter(|_| discarded);
        let buffered = self.files.iter().filter(|file| !file.is_direct()).map(|file| {
            let path = file.path().display();
            format!("{path} is on a file system without direct I/O: transfers go through the page cache")
        });
        takeovers.chain(buffered).collect()
    }

    /// Removes the scratch directories if the store is ephemeral, and releases their locks. Operations
    /// still in flight end normally, on files that no longer have a name.
    ///
    /// # Errors
    ///
    /// [`StorageError::File`] for the first thing that could not be removed.
    pub fn close(mut self) -> Result<(), StorageError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), StorageError> {
        // A forked child holds the parent's lock without owning it.
        let release = std::mem::replace(&mut self.release, Release::Keep);
        if release == Release::Keep || self.guard.is_forked() {
            return Ok(());
        }
        let outcomes: Vec<_> = self.scratch.iter().map(Scratch::remove).collect();
        outcomes.into_iter().collect()
    }

    fn write_headers(&self) -> Result<(), StorageError> {
        for (directory, scratch) in self.scratch.iter().enumerate() {
            self.header_of(directory)
                .write(scratch.path(), self.queue.journal())?;
        }
        Ok(())
    }

    fn header_of(&self, directory: usize) -> Header {
        Header {
            directory,
            ..self.header.clone()
        }
    }

    /// Finds a tile and checks that a buffer of `length` bytes is meant for it.
    fn locate(
        &self,
        block: BlockId,
        tile: u32,
        length: usize,
    ) -> Result<(usize, Home), StorageError> {
        // Before the lock of the checksums, which another thread may have held at the fork.
        self.guard.check_process()?;
        let (index, home) = self.placement.find(block, tile)?;
        if length == home.length {
            Ok((index, home))
        } else {
            Err(StorageError::TileLength {
                block,
                tile,
                expected: home.length,
                got: length,
            })
        }
    }

    fn never_written(&self, block: BlockId, tile: u32, home: Home) -> StorageError {
        let path = self.file(home).path().to_path_buf();
        StorageError::NeverWritten { path, block, tile }
    }

    fn file(&self, home: Home) -> &Arc<DiskFile> {
        &self.files[home.directory]
    }

    fn submit(
        &self,
        kind: OpKind,
        block: BlockId,
        home: Home,
        buffer: Lease,
        tag: u64,
        reply: impl Into<Reply>,
    ) -> Result<(), (StorageError, Lease)> {
        let operation = Operation {
            kind,
            file: Arc::clone(self.file(home)),
            offset: home.offset,
            buffer,
            tag,
            unit: usize::try_from(block.unit).ok(),
            reply: reply.into(),
        };
        self.queue
            .submit(operation)
            .map_err(|(error, operation)| (error, operation.buffer))
    }
}

impl Drop for BlockStore {
    fn drop(&mut self) {
        // Whoever wants to know closes the store.
        let _ = self.release();
    }
}

impl fmt::Debug for BlockStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockStore")
            .field(
                "directories",
                &self.scratch.iter().map(Scratch::path).collect::<Vec<_>>(),
            )
            .field("tiles", &self.placement.len())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

fn check_job(job: &str) -> Result<(), StorageError> {
    let reason = if job.is_empty() {
        "it is empty"
    } else if job == "." || job == ".." {
        "it names the directory itself or its parent"
    } else if job.contains(['/', '\0']) {
        "it contains a slash or a NUL"
    } else if job.len() > 200 {
        "it is longer than 200 bytes"
    } else {
        return Ok(());
    };
    Err(StorageError::JobName {
        job: job.into(),
        reason,
    })
}

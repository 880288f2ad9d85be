//! Durable stores: what was committed survives the end of the process, however it ends, and of the machine.
//!
//! A commit is the state of every tile at one moment, and a note of the caller's. It is in two halves, between which
//! several stores, one for each rank, can agree:
//!
//! ```text
//! prepare   sync the data; write a manifest that names the newest version of every tile, aside; sync, rename, sync
//! (all ranks have prepared)
//! conclude  remove the manifest before; what that one named may be overwritten from now on
//! ```
//!
//! Between the halves both commits are whole, and nothing may be written. Whoever finds two manifests goes on with the
//! newest that all ranks have ([`BlockStore::adopt`]).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zeroxide_layout::BlockId;
use zeroxide_memory::Lease;

use super::BlockStore;
use super::checksums::checksum;
use super::header::Header;
use super::manifest::{MANIFEST_NEXT, Manifest};
use super::publish::{publish, sync_directory, withdraw};
use crate::error::StorageError;
use crate::queue::{OpKind, Reply};

/// Makes a store durable.
#[derive(Debug, Clone, Default)]
pub struct Durable {
    /// (name, value) of what a run must have in common with the one that it continues.
    pub facts: Vec<(String, String)>,
}

/// One commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// Its number, from 1.
    pub generation: u64,
    /// What the caller noted with it.
    pub note: String,
}

/// Keeps the last commit's bytes where they are, for who reads them while the store goes on.
#[derive(Debug)]
pub struct Pin(Arc<AtomicUsize>);

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Where a durable store stands.
#[derive(Debug)]
enum Phase {
    /// What was found has not been looked at: nothing may be written.
    Found(Vec<Manifest>),
    /// Tiles are written; the last commit is this one.
    Open(u64),
    /// Prepared and not concluded: the last commit, and the one that is to follow it.
    Prepared(u64, u64),
}

/// The commits of a durable store.
#[derive(Debug)]
pub(super) struct Commits {
    phase: Mutex<Phase>,
    /// Whether tiles may be written; follows from the phase, for who asks at every write.
    writable: AtomicBool,
    /// A write or a sync has failed: what was written may be lost though a later sync succeeds.
    lost: AtomicBool,
    pins: Arc<AtomicUsize>,
}

impl Commits {
    fn new(phase: Phase) -> Self {
        Self {
            writable: AtomicBool::new(matches!(phase, Phase::Open(_))),
            phase: Mutex::new(phase),
            lost: AtomicBool::new(false),
            pins: Arc::new(AtomicUsize::new(0)),
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // The phase is replaced in one assignment after everything else has succeeded.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: &mut Phase, next: Phase) {
        self.writable
            .store(matches!(next, Phase::Open(_)), Ordering::Release);
        *phase = next;
    }

    /// Generations that were found and not adopted yet, the oldest first.
    pub(super) fn found(&self) -> Vec<u64> {
        match &*self.phase() {
            Phase::Found(manifests) => manifests.iter().map(|it| it.generation).collect(),
            _ => Vec::new(),
        }
    }
}

/// Whether something was committed to the store in `directory`.
pub(super) fn is_committed(directory: &Path) -> Result<bool, StorageError> {
    match Manifest::list(directory) {
        Ok(found) => Ok(!found.is_empty()),
        Err(StorageError::File { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(other) => Err(other),
    }
}

impl BlockStore {
    /// Opens what was committed before, or makes the store anew where nothing was.
    pub(super) fn open_commits(&mut self) -> Result<(), StorageError> {
        let first = self.first_directory().to_path_buf();
        let generations = Manifest::list(&first)?;
        if generations.is_empty() {
            self.allocate(2)?;
            let journal = self.queue.journal();
            for scratch in &self.scratch {
                // The names of the directory itself, and of its data file, which no rename makes safe.
                if let Some(parent) = scratch.path().parent() {
                    sync_directory(parent, journal)?;
                }
            }
            self.commits = Some(Commits::new(Phase::Open(0)));
            return Ok(());
        }
        for (directory, scratch) in self.scratch.iter().enumerate() {
            let found = Header::read(scratch.path())?;
            let wanted = self.header_of(directory);
            if let Some(difference) = found.difference(&wanted) {
                return Err(StorageError::OtherRun {
                    path: scratch.path().to_path_buf(),
                    difference: Box::new(difference),
                });
            }
        }
        let (tiles, blocks) = (self.placement.len(), self.header.identity());
        let manifests = generations
            .iter()
            .map(|generation| Manifest::read(&first, *generation, tiles, blocks))
            .collect::<Result<Vec<_>, _>>()?;
        for (scratch, bytes) in self.scratch.iter().zip(self.placement.bytes(2)) {
            self.files.push(scratch.reopen(bytes)?);
        }
        self.commits = Some(Commits::new(Phase::Found(manifests)));
        Ok(())
    }

    /// Commits that an earlier run has left and that [`adopt`](Self::adopt) has not been asked for yet, the oldest first.
    pub fn found(&self) -> Vec<u64> {
        self.commits.as_ref().map_or_else(Vec::new, Commits::found)
    }

    /// Goes on from one of the commits [`found`](Self::found), or from none of them for 0, where every tile is as if it
    /// had never been written. Others are forgotten. Tiles read as never written until they are written, or
    /// [rolled back](Self::roll_back).
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] where there is no such commit, [`StorageError::File`].
    pub fn adopt(&self, generation: u64) -> Result<Option<Commit>, StorageError> {
        let commits = self.commits("adopt")?;
        let mut phase = commits.phase();
        let Phase::Found(found) = &*phase else {
            return Err(self.refuse("adopt", "nothing was found, or one was adopted before"));
        };
        let chosen = found.iter().find(|it| it.generation == generation);
        if chosen.is_none() && generation != 0 {
            return Err(self.refuse("adopt", "there is no such commit"));
        }
        let journal = self.queue.journal();
        for other in found.iter().filter(|it| it.generation != generation) {
            withdraw(
                self.first_directory(),
                &Manifest::name(other.generation),
                journal,
            )?;
        }
        if found.len() > 1 || chosen.is_none() {
            // One that comes back after its bytes were overwritten would be taken for a commit.
            sync_directory(self.first_directory(), journal)?;
        }
        let commit = chosen.map(|manifest| {
            self.versions.adopt(&manifest.versions());
            Commit {
                generation,
                note: manifest.note.clone(),
            }
        });
        // Later generations may have been taken by ranks that came further: numbers go up on all of them alike.
        commits.enter(&mut phase, Phase::Open(generation));
        Ok(commit)
    }

    /// Number of the last commit; 0 for none.
    pub fn generation(&self) -> u64 {
        self.commits
            .as_ref()
            .map_or(0, |commits| match &*commits.phase() {
                Phase::Found(found) => found.last().map_or(0, |it| it.generation),
                Phase::Open(last) | Phase::Prepared(last, _) => *last,
            })
    }

    /// Writes down that the newest version of every tile, and `note`, belong together. All writes have been answered.
    /// Returns the number of the commit; until [`conclude_commit`](Self::conclude_commit) nothing may be written.
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] for a store that is not durable or not ready, or after a sync has failed once; else what
    /// the disk says. The commit before is then still the last one, or this one is: which, an opening tells.
    pub fn prepare_commit(&self, note: &str) -> Result<u64, StorageError> {
        let commits = self.commits("prepare_commit")?;
        let mut phase = commits.phase();
        let Phase::Open(last) = *phase else {
            return Err(self.refuse(
                "prepare_commit",
                "another commit is under way, or none was adopted",
            ));
        };
        if commits.pins.load(Ordering::Acquire) > 0 {
            return Err(self.refuse("prepare_commit", "the commit before is still being read"));
        }
        if commits.lost.load(Ordering::Acquire) {
            let reason = "a write or a sync has failed before: what was written since may be lost";
            return Err(self.refuse("prepare_commit", reason));
        }
        for file in &self.files {
            self.queue
                .sync(file)
                .inspect_err(|_| commits.lost.store(true, Ordering::Release))?;
        }
        let manifest = Manifest {
            generation: last + 1,
            blocks: self.header.identity(),
            tiles: self
                .versions
                .all()
                .into_iter()
                .map(|tile| tile.map(|version| (version.slot, version.crc)))
                .collect(),
            note: note.into(),
        };
        let (directory, name) = (self.first_directory(), Manifest::name(last + 1));
        let text = manifest.text().map_err(|reason| StorageError::Header {
            path: directory.join(&name),
            reason,
        })?;
        publish(
            directory,
            &name,
            MANIFEST_NEXT,
            text.as_bytes(),
            self.queue.journal(),
        )?;
        commits.enter(&mut phase, Phase::Prepared(last, last + 1));
        Ok(last + 1)
    }

    /// All who must have prepared have: what the commit before named may be overwritten.
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] where nothing was prepared, [`StorageError::File`].
    pub fn conclude_commit(&self) -> Result<(), StorageError> {
        let commits = self.commits("conclude_commit")?;
        let mut phase = commits.phase();
        let Phase::Prepared(before, generation) = *phase else {
            return Err(self.refuse("conclude_commit", "none was prepared"));
        };
        if before > 0 {
            let name = Manifest::name(before);
            withdraw(self.first_directory(), &name, self.queue.journal())?;
        }
        self.versions.commit();
        commits.enter(&mut phase, Phase::Open(generation));
        Ok(())
    }

    /// Whether it has commits.
    pub fn is_durable(&self) -> bool {
        self.commits.is_some()
    }

    /// A write has failed whose tile a later commit would name: none is made any more.
    pub fn lose(&self) {
        if let Some(commits) = &self.commits {
            commits.lost.store(true, Ordering::Release);
        }
    }

    /// Makes every tile what the last commit says: what was written since is forgotten, and a tile that was not written
    /// by then was never written.
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] while a commit is under way.
    pub fn roll_back(&self) -> Result<(), StorageError> {
        let commits = self.commits("roll_back")?;
        let phase = commits.phase();
        if !matches!(*phase, Phase::Open(_)) {
            return Err(self.refuse("roll_back", "a commit is under way, or none was adopted"));
        }
        self.versions.roll_back();
        Ok(())
    }

    /// Keeps the bytes of the last commit where they are until it is dropped: until then no other is prepared.
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] where there is none.
    pub fn pin(&self) -> Result<Pin, StorageError> {
        let commits = self.commits("pin")?;
        let phase = commits.phase();
        if !matches!(*phase, Phase::Open(1..)) {
            return Err(self.refuse("pin", "nothing has been committed"));
        }
        commits.pins.fetch_add(1, Ordering::AcqRel);
        Ok(Pin(Arc::clone(&commits.pins)))
    }

    /// The checksum of a tile as it was last written, if it was.
    ///
    /// # Errors
    ///
    /// [`StorageError::UnknownTile`].
    pub fn newest_checksum(&self, block: BlockId, tile: u32) -> Result<Option<u64>, StorageError> {
        let (index, _) = self.placement.find(block, tile)?;
        Ok(self.versions.newest(index).map(|version| version.crc))
    }

    /// As [`start_read`](Self::start_read), of the version that the last commit names.
    ///
    /// # Errors
    ///
    /// As [`start_read`](Self::start_read).
    pub fn start_read_committed(
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
        let Some(version) = self.versions.committed(index) else {
            return Err((self.never_written(block, tile, home), buffer));
        };
        let home = self.place(home, version);
        self.submit(OpKind::Read, block, home, buffer, tag, reply)
    }

    /// As [`verify`](Self::verify), against the version that the last commit names.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn verify_committed(
        &self,
        block: BlockId,
        tile: u32,
        bytes: &[u8],
    ) -> Result<(), StorageError> {
        let (index, home) = self.locate(block, tile, bytes.len())?;
        let Some(expected) = self.versions.committed(index) else {
            return Err(self.never_written(block, tile, home));
        };
        self.compare(block, tile, home, expected, checksum(bytes))
    }

    /// Refuses a write while the store must stay as it is.
    pub(super) fn check_writable(&self) -> Result<(), StorageError> {
        match &self.commits {
            Some(commits) if !commits.writable.load(Ordering::Acquire) => {
                Err(self.refuse("write", "a commit is under way, or none was adopted"))
            }
            _ => Ok(()),
        }
    }

    fn commits(&self, call: &'static str) -> Result<&Commits, StorageError> {
        self.guard.check_process()?;
        self.commits
            .as_ref()
            .ok_or_else(|| self.refuse(call, "it is not durable"))
    }

    fn first_directory(&self) -> &Path {
        self.scratch[0].path()
    }

    pub(super) fn refuse(&self, call: &'static str, reason: &'static str) -> StorageError {
        StorageError::Commit {
            call,
            path: self
                .scratch
                .first()
                .map_or_else(PathBuf::new, |it| it.path().to_path_buf()),
            reason,
        }
    }
}

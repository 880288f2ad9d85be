//! What a disk that drops and reorders may hold after a power cut, made from a journal of what was done to it.
//!
//! Only what was synced is certain. Of the rest any part may be there: each write in place in any of its sectors, each
//! change of a name or not, in any order between files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use zeroxide_storage::JournalEntry;

/// Bytes that a disk writes as one.
const SECTOR: usize = 512;

/// Random choices of a seed (xorshift64*, Vigna 2016, "An experimental exploration of Marsaglia's xorshift generators").
pub(crate) struct Choices(u64);

impl Choices {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).unwrap() % bound.max(1)
    }

    fn yes(&mut self) -> bool {
        self.below(2) == 1
    }
}

/// The bytes of one file, whatever it is called.
#[derive(Default)]
struct Inode {
    synced: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
}

impl Inode {
    fn sync(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.pending) {
            put(&mut self.synced, offset, &bytes);
        }
    }

    fn after_cut(&self, choices: &mut Choices) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        let mut order: Vec<usize> = (0..self.pending.len()).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, choices.below(index + 1));
        }
        // Often everything or nothing: what is left of a single write is the rarest to be chosen otherwise.
        let how = choices.below(4);
        for index in order {
            let (offset, written) = &self.pending[index];
            for (number, sector) in written.chunks(SECTOR).enumerate() {
                if how == 1 || how > 1 && choices.yes() {
                    put(&mut bytes, offset + number * SECTOR, sector);
                }
            }
        }
        bytes
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, written: &[u8]) {
    let end = offset + written.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(written);
}

/// A change of names, done as a whole or not at all.
struct Change {
    directory: PathBuf,
    unlink: Option<PathBuf>,
    link: Option<(PathBuf, usize)>,
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        if let Some(path) = &self.unlink {
            names.remove(path);
        }
        if let Some((path, inode)) = &self.link {
            names.insert(path.clone(), *inode);
        }
    }
}

/// A disk in the middle of what is done to it.
#[derive(Default)]
pub(crate) struct Platter {
    inodes: Vec<Inode>,
    /// What names mean now, and what they certainly mean after a cut.
    names: BTreeMap<PathBuf, usize>,
    synced: BTreeMap<PathBuf, usize>,
    pending: Vec<Change>,
}

impl Platter {
    /// A disk with these files, all synced.
    pub(crate) fn with_files(files: impl IntoIterator<Item = (PathBuf, Vec<u8>)>) -> Self {
        let mut platter = Self::default();
        for (path, synced) in files {
            platter.names.insert(path, platter.inodes.len());
            platter.inodes.push(Inode {
                synced,
                pending: Vec::new(),
            });
        }
        platter.synced = platter.names.clone();
        platter
    }

    pub(crate) fn act(&mut self, entry: &JournalEntry) {
        match entry {
            JournalEntry::Write {
                path,
                offset,
                bytes,
            } => {
                let inode = self.names[path];
                let offset = usize::try_from(*offset).unwrap();
                self.inodes[inode].pending.push((offset, bytes.clone()));
            }
            JournalEntry::Create { path, bytes } => {
                let inode = self.inodes.len();
                self.inodes.push(Inode {
                    synced: Vec::new(),
                    pending: vec![(0, bytes.clone())],
                });
                self.change(None, Some((path.clone(), inode)), path);
            }
            JournalEntry::Sync { path } => {
                let inode = self.names[path];
                self.inodes[inode].sync();
            }
            JournalEntry::Rename { from, to } => {
                let inode = self.names[from];
                self.change(Some(from.clone()), Some((to.clone(), inode)), to);
            }
            JournalEntry::Remove { path } => self.change(Some(path.clone()), None, path),
            JournalEntry::SyncDirectory { path } => {
                let (synced, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
                    .into_iter()
                    .partition(|change| change.directory == *path);
                for change in synced {
                    change.apply(&mut self.synced);
                }
                self.pending = rest;
            }
        }
    }

    fn change(&mut self, unlink: Option<PathBuf>, link: Option<(PathBuf, usize)>, at: &Path) {
        let change = Change {
            directory: at.parent().unwrap().to_path_buf(),
            unlink,
            link,
        };
        change.apply(&mut self.names);
        self.pending.push(change);
    }

    /// Writes what a cut at this moment may leave: files below `from` to the same places below `to`.
    pub(crate) fn cut(&self, choices: &mut Choices, from: &Path, to: &Path) {
        let mut names = self.synced.clone();
        for change in &self.pending {
            if choices.yes() {
                change.apply(&mut names);
            }
        }
        let mut made = BTreeSet::new();
        for (path, inode) in names {
            let target = to.join(path.strip_prefix(from).unwrap());
            let parent = target.parent().unwrap().to_path_buf();
            if made.insert(parent.clone()) {
                fs::create_dir_all(parent).unwrap();
            }
            fs::write(target, self.inodes[inode].after_cut(choices)).unwrap();
        }
    }
}

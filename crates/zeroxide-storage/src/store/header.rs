//! The header of a scratch directory: whose it is, and which blocks its file holds.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checksums::checksum;
use super::placement::BlockSpec;
use super::publish::publish;
use super::sealed::{seal, unseal};
use crate::error::{Difference, StorageError};
use crate::queue::Journal;

/// The beginning of the first line; the number is the format version.
pub(super) const MAGIC: &str = "zeroxide-blocks 2 ";

/// Name of the header in its directory.
pub(super) const HEADER: &str = "header";
/// Name under which the next header is written.
pub(super) const HEADER_NEXT: &str = "header.next";

/// The contents of a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    /// Which of the store's directories this one is.
    pub(super) directory: usize,
    /// How many directories the store has.
    pub(super) directories: usize,
    /// The parts that they have of all bytes; empty where these are equal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) shares: Vec<u64>,
    /// (name, value) of what a run that continues from the store must have in common with the one that made it.
    pub(super) facts: Vec<(String, String)>,
    /// The blocks, in the order in which they were laid out.
    pub(super) blocks: Vec<Entry>,
}

/// One block of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    unit: u32,
    component: String,
    bytes: u64,
    tile_bytes: u64,
    /// No commit names it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    uncommitted: bool,
}

impl From<&BlockSpec> for Entry {
    fn from(spec: &BlockSpec) -> Self {
        Self {
            unit: spec.id.unit,
            component: spec.id.key.name().into(),
            bytes: spec.bytes,
            tile_bytes: spec.tile_bytes,
            uncommitted: !spec.committed,
        }
    }
}

impl Entry {
    fn describe(&self) -> String {
        let (unit, what) = (self.unit, &self.component);
        let once = if self.uncommitted {
            ", which no commit holds"
        } else {
            ""
        };
        format!(
            "unit {unit} {what} of {} bytes in tiles of {}{once}",
            self.bytes, self.tile_bytes
        )
    }
}

impl Header {
    /// Replaces the header of the scratch directory at `directory`.
    pub(super) fn write(
        &self,
        directory: &Path,
        journal: Option<&Journal>,
    ) -> Result<(), StorageError> {
        let text = seal(MAGIC, self).map_err(|reason| StorageError::Header {
            path: directory.join(HEADER),
            reason,
        })?;
        publish(directory, HEADER, HEADER_NEXT, text.as_bytes(), journal)
    }

    /// Reads the header of the scratch directory at `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self, StorageError> {
        let path = directory.join(HEADER);
        let bytes = fs::read(&path).map_err(|source| StorageError::File {
            action: "read",
            path: path.clone(),
            source,
        })?;
        parse(&bytes).map_err(|reason| StorageError::Header { path, reason })
    }

    /// Checksum of everything that a manifest relies on.
    pub(super) fn identity(&self) -> u64 {
        let words: Vec<String> = self.blocks.iter().map(Entry::describe).collect();
        let shares = if self.shares.is_empty() {
            String::new()
        } else {
            format!(" by {:?}", self.shares)
        };
        let directories = self.directories;
        checksum(format!("{directories} directories{shares}, {}", words.join(", ")).as_bytes())
    }

    /// The first thing in which this header, which was found, is not what is `wanted`.
    pub(super) fn difference(&self, wanted: &Self) -> Option<Difference> {
        let missing = || "nothing".to_owned();
        for (name, value) in &wanted.facts {
            let found = self.facts.iter().find(|(other, _)| other == name);
            if found.map(|(_, value)| value) != Some(value) {
                return Some(Difference {
                    what: name.clone(),
                    found: found.map_or_else(missing, |(_, value)| value.clone()),
                    wanted: value.clone(),
                });
            }
        }
        let place = |header: &Self| (header.directory, header.directories);
        if place(self) != place(wanted) {
            let said = |header: &Self| format!("{} of {}", header.directory, header.directories);
            return Some(Difference {
                what: "number of the directory".into(),
                found: said(self),
                wanted: said(wanted),
            });
        }
        let said = |entry: Option<&Entry>| entry.map_or_else(missing, Entry::describe);
        (0..self.blocks.len().max(wanted.blocks.len())).find_map(|index| {
            let (found, block) = (self.blocks.get(index), wanted.blocks.get(index));
            (found != block).then(|| Difference {
                what: format!("block {index}"),
                found: said(found),
                wanted: said(block),
            })
        })
    }
}

/// The header in the bytes of its file, or what is wrong with them.
pub(super) fn parse(bytes: &[u8]) -> Result<Header, String> {
    unseal(MAGIC, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            directory: 1,
            directories: 2,
            shares: vec![3, 1],
            facts: vec![("world".into(), "2".into())],
            blocks: vec![Entry {
                unit: 4,
                component: "exp_avg".into(),
                bytes: 8192,
                tile_bytes: 4096,
                uncommitted: false,
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_nothing_is_left_aside() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        header().write(directory.path(), None).expect("writable");
        assert_eq!(Header::read(directory.path()).expect("readable"), header());
        assert!(!directory.path().join(HEADER_NEXT).exists());
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_noticed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        header().write(directory.path(), None).expect("writable");
        let path = directory.path().join(HEADER);
        let good = fs::read(&path).expect("readable");
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 1;
            fs::write(&path, &bad).expect("writable");
            assert!(
                Header::read(directory.path()).is_err(),
                "byte {index} flipped unnoticed"
            );
            fs::write(&path, &good[..index]).expect("writable");
            assert!(
                Header::read(directory.path()).is_err(),
                "cut at {index} unnoticed"
            );
        }
    }

    /// Catches: a run with another world, or with a block of another size, that goes on with the store.
    #[test]
    fn what_differs_is_named_with_both_values() {
        assert_eq!(header().difference(&header()), None);
        let mut other = header();
        other.facts[0].1 = "4".into();
        let named = header().difference(&other).expect("another world");
        assert_eq!(named.to_string(), "world 2, and this one has 4");
        let mut other = header();
        other.blocks[0].bytes = 4096;
        let named = header().difference(&other).expect("another size");
        assert_eq!(named.what, "block 0");
        assert!(named.found.contains("8192") && named.wanted.contains("4096"));
        assert_ne!(header().identity(), other.identity());
        other.blocks.clear();
        let named = header().difference(&other).expect("no block");
        assert_eq!(named.wanted, "nothing");
        other = header();
        other.directory = 0;
        assert!(header().difference(&other).is_some());
    }
}

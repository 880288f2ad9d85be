//! The header of a scratch directory: which blocks its file holds, and the generation.
//!
//! A header is one line that identifies the file, its format version, and the CRC-64/NVME of the rest,
//! and then JSON. It is written aside and renamed, so whoever reads it sees the old one or the new one.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checksums::checksum;
use super::placement::BlockSpec;
use crate::error::StorageError;
use crate::file::refusal;
use crate::private;

/// The beginning of the first line; the number is the format version.
const MAGIC: &str = "zeroxide-blocks 1 ";

/// Name of the header in its directory.
pub(super) const HEADER: &str = "header";
/// Name under which the next header is written.
pub(super) const HEADER_NEXT: &str = "header.next";

/// The contents of a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    /// How often the store has been advanced.
    pub(super) generation: u64,
    /// Which of the store's directories this one is.
    pub(super) directory: usize,
    /// How many directories the store has.
    pub(super) directories: usize,
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
}

impl From<&BlockSpec> for Entry {
    fn from(spec: &BlockSpec) -> Self {
        Self {
            unit: spec.id.unit,
            component: spec.id.key.name().into(),
            bytes: spec.bytes,
            tile_bytes: spec.tile_bytes,
        }
    }
}

impl Header {
    /// Replaces the header of the scratch directory at `directory`.
    pub(super) fn write(&self, directory: &Path) -> Result<(), StorageError> {
        let next = directory.join(HEADER_NEXT);
        let path = directory.join(HEADER);
        let body = serde_json::to_string_pretty(self).map_err(|error| StorageError::Header {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let text = format!("{MAGIC}{:016x}\n{body}\n", checksum(body.as_bytes()));
        private::create_file(&next)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|source| refusal("write", &next, source))?;
        fs::rename(&next, &path).map_err(|source| refusal("rename", &path, source))
    }

    /// Reads the header of the scratch directory at `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self, StorageError> {
        let path = directory.join(HEADER);
        let text = fs::read_to_string(&path).map_err(|source| StorageError::File {
            action: "read",
            path: path.clone(),
            source,
        })?;
        parse(&text).map_err(|reason| bad(path, reason))
    }
}

fn parse(text: &str) -> Result<Header, String> {
    let (first, body) = text.split_once('\n').ok_or("it has no first line")?;
    let sum = first
        .strip_prefix(MAGIC)
        .ok_or_else(|| format!("it does not begin with {MAGIC:?}"))?;
    let expected = u64::from_str_radix(sum, 16).map_err(|_| "its checksum is not a number")?;
    let body = body.strip_suffix('\n').ok_or("it is cut short")?;
    let got = checksum(body.as_bytes());
    if got != expected {
        return Err(format!("its checksum is {got:016x}, not {expected:016x}"));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}

fn bad(path: PathBuf, reason: String) -> StorageError {
    StorageError::Header { path, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            generation: 7,
            directory: 1,
            directories: 2,
            blocks: vec![Entry {
                unit: 4,
                component: "exp_avg".into(),
                bytes: 8192,
                tile_bytes: 4096,
            }],
        }
    }

    #[test]
    fn what_is_written_is_read_back_and_nothing_is_left_aside() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        header().write(directory.path()).expect("writable");
        assert_eq!(Header::read(directory.path()).expect("readable"), header());
        assert!(!directory.path().join(HEADER_NEXT).exists());
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_noticed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        header().write(directory.path()).expect("writable");
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
}

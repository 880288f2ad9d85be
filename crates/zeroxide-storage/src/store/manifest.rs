//! What a commit says: which version of every tile belongs to it, and what the caller has noted beside them.
//!
//! ```text
//! manifest-<generation, 20 digits>
//!     zeroxide-commit 1 <CRC-64/NVME of the rest, 16 hex digits>
//!     {"generation": ..., "blocks": <checksum of the block table>, "tiles": [...], "note": "..."}
//! ```
//!
//! The generation is in the name, so that one that cannot be read is known to be there, and never passes for none.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::sealed::{seal, unseal};
use super::versions::Version;
use crate::error::StorageError;

/// The beginning of the first line; the number is the format version.
pub(super) const MAGIC: &str = "zeroxide-commit 1 ";

/// The beginning of the name of every manifest.
const PREFIX: &str = "manifest-";
/// Name under which the next manifest is written.
pub(super) const MANIFEST_NEXT: &str = "manifest.next";

/// The contents of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    /// Number of the commit, from 1.
    pub(super) generation: u64,
    /// Checksum of the table of blocks that it is about.
    pub(super) blocks: u64,
    /// (slot, checksum) of each tile in the order of the placement; none for a tile that was never written.
    pub(super) tiles: Vec<Option<(u8, u64)>>,
    /// What the caller has noted.
    pub(super) note: String,
}

impl Manifest {
    /// Name of the file of a generation.
    pub(super) fn name(generation: u64) -> String {
        format!("{PREFIX}{generation:020}")
    }

    /// The generation of the manifest with this name; `None` for another file.
    pub(super) fn generation_of(name: &str) -> Option<u64> {
        let digits = name.strip_prefix(PREFIX)?;
        (digits.len() == 20).then(|| digits.parse().ok()).flatten()
    }

    /// Generations whose manifests are in `directory`, the oldest first.
    pub(super) fn list(directory: &Path) -> Result<Vec<u64>, StorageError> {
        let entries = fs::read_dir(directory).map_err(|source| StorageError::File {
            action: "list",
            path: directory.to_path_buf(),
            source,
        })?;
        let mut found: Vec<u64> = entries
            .flatten()
            .filter_map(|entry| Self::generation_of(entry.file_name().to_str()?))
            .collect();
        found.sort_unstable();
        Ok(found)
    }

    /// The text of its file.
    pub(super) fn text(&self) -> Result<String, String> {
        seal(MAGIC, self)
    }

    /// Reads the manifest of a generation in `directory`, for a store of `tiles` tiles with this table of `blocks`.
    pub(super) fn read(
        directory: &Path,
        generation: u64,
        tiles: usize,
        blocks: u64,
    ) -> Result<Self, StorageError> {
        let path = directory.join(Self::name(generation));
        let bytes = fs::read(&path).map_err(|source| StorageError::File {
            action: "read",
            path: path.clone(),
            source,
        })?;
        parse(&bytes)
            .and_then(|manifest| manifest.checked(generation, tiles, blocks))
            .map_err(|reason| StorageError::Header { path, reason })
    }

    /// Refuses one that is of another generation, or about other blocks, or names what there is not.
    pub(super) fn checked(
        self,
        generation: u64,
        tiles: usize,
        blocks: u64,
    ) -> Result<Self, String> {
        if self.generation != generation {
            return Err(format!("it is of generation {}", self.generation));
        }
        if self.blocks != blocks || self.tiles.len() != tiles {
            return Err("it is about other blocks".into());
        }
        if self.tiles.iter().flatten().any(|(slot, _)| *slot > 1) {
            return Err("it names a slot that there is not".into());
        }
        Ok(self)
    }

    /// The versions that it names.
    pub(super) fn versions(&self) -> Vec<Option<Version>> {
        let version = |(slot, crc)| Version { slot, crc };
        self.tiles.iter().map(|tile| tile.map(version)).collect()
    }
}

/// The manifest in the bytes of its file, or what is wrong with them.
pub(super) fn parse(bytes: &[u8]) -> Result<Manifest, String> {
    unseal(MAGIC, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            generation: 7,
            blocks: 99,
            tiles: vec![Some((0, u64::MAX)), None, Some((1, 5))],
            note: "{\"step\": 3, \"text\": \"a\\nb\"}".into(),
        }
    }

    fn store(directory: &Path, bytes: &[u8]) {
        fs::write(directory.join(Manifest::name(7)), bytes).expect("writable");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        store(
            directory.path(),
            manifest().text().expect("plain").as_bytes(),
        );
        assert_eq!(Manifest::list(directory.path()).expect("readable"), [7]);
        let read = Manifest::read(directory.path(), 7, 3, 99).expect("readable");
        assert_eq!(read, manifest());
        for (tiles, blocks) in [(2, 99), (3, 98)] {
            assert!(Manifest::read(directory.path(), 7, tiles, blocks).is_err());
        }
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_noticed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let good = manifest().text().expect("plain").into_bytes();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 1;
            for bytes in [&bad[..], &good[..index]] {
                store(directory.path(), bytes);
                let outcome = Manifest::read(directory.path(), 7, 3, 99);
                assert!(
                    matches!(outcome, Err(StorageError::Header { .. })),
                    "byte {index}"
                );
            }
        }
    }

    #[test]
    fn a_slot_that_there_is_not_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let bad = Manifest {
            tiles: vec![Some((2, 1))],
            ..manifest()
        };
        store(directory.path(), bad.text().expect("plain").as_bytes());
        assert!(Manifest::read(directory.path(), 7, 1, 99).is_err());
    }
}

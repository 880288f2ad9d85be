//! What is known of every tile: its newest version, and the one that the last commit names.
//!
//! ```text
//!            committed   newest          the next write goes to
//! at first   -           -               slot 0
//! written    -           slot 0          slot 0
//! committed  slot 0      slot 0          slot 1: what the commit names stays as it is
//! written    slot 0      slot 1          slot 1
//! committed  slot 1      slot 1          slot 0
//! ```
//!
//! A store that commits nothing never leaves slot 0, unless it speculates ([`speculation`](super::speculation)): what it
//! keeps takes the part of a commit.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One version of a tile: where it is and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    /// Which of the tile's two places.
    pub(super) slot: u8,
    /// Checksum of its bytes.
    pub(super) crc: u64,
}

/// What is known of one tile. `None` where nothing was ever written.
#[derive(Debug, Clone, Copy, Default)]
struct Tile {
    /// Commits name it. Where they do not, it has one place, and is forgotten when a commit is gone back to.
    kept: bool,
    newest: Option<Version>,
    committed: Option<Version>,
}

/// The versions of all tiles.
#[derive(Debug)]
pub(super) struct Versions {
    tiles: Mutex<Box<[Tile]>>,
}

impl Versions {
    /// kept: of each tile, whether commits name it.
    pub(super) fn new(kept: impl Iterator<Item = bool>) -> Self {
        let tile = |kept| Tile {
            kept,
            ..Tile::default()
        };
        Self {
            tiles: Mutex::new(kept.map(tile).collect()),
        }
    }

    /// The newest version of a tile.
    pub(super) fn newest(&self, tile: usize) -> Option<Version> {
        self.lock().get(tile).and_then(|tile| tile.newest)
    }

    /// The version of a tile that the last commit names.
    pub(super) fn committed(&self, tile: usize) -> Option<Version> {
        self.lock().get(tile).and_then(|tile| tile.committed)
    }

    /// Notes that bytes with this checksum are about to be written. Returns the version that they are, and the newest
    /// one before.
    pub(super) fn begin(&self, tile: usize, crc: u64) -> (Version, Option<Version>) {
        let mut tiles = self.lock();
        let tile = &mut tiles[tile];
        let slot = tile.committed.map_or(0, |committed| 1 - committed.slot);
        let version = Version { slot, crc };
        (version, tile.newest.replace(version))
    }

    /// Takes back what [`begin`](Self::begin) has noted.
    pub(super) fn restore(&self, tile: usize, before: Option<Version>) {
        self.lock()[tile].newest = before;
    }

    /// What a commit would name of every tile.
    pub(super) fn all(&self) -> Vec<Option<Version>> {
        let named = |tile: &Tile| tile.newest.filter(|_| tile.kept);
        self.lock().iter().map(named).collect()
    }

    /// The newest versions are those that the last commit names.
    pub(super) fn commit(&self) {
        for tile in &mut *self.lock() {
            tile.committed = tile.newest.filter(|_| tile.kept);
        }
    }

    /// The last commit names these versions, and nothing has been written since that counts.
    pub(super) fn adopt(&self, versions: &[Option<Version>]) {
        for (tile, version) in self.lock().iter_mut().zip(versions) {
            *tile = Tile {
                kept: tile.kept,
                newest: None,
                committed: version.filter(|_| tile.kept),
            };
        }
    }

    /// What was written of tiles that commits name since their last version was kept is gone again.
    pub(super) fn take_back(&self) {
        for tile in self.lock().iter_mut().filter(|tile| tile.kept) {
            tile.newest = tile.committed;
        }
    }

    /// Forgets what was written since the last commit.
    pub(super) fn roll_back(&self) {
        for tile in &mut *self.lock() {
            tile.newest = tile.committed;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Box<[Tile]>> {
        // Each version is written in one assignment, so a panic elsewhere leaves nothing half done.
        self.tiles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches: a write into the slot that the last commit names, and a slot changed twice between commits.
    #[test]
    fn a_write_never_goes_where_the_last_commit_is() {
        let versions = Versions::new([true].into_iter());
        let mut slots = Vec::new();
        for round in 0..4 {
            for crc in 0..3 {
                let committed = versions.committed(0);
                let (version, _) = versions.begin(0, round * 10 + crc);
                assert_ne!(Some(version.slot), committed.map(|it| it.slot));
                slots.push(version.slot);
            }
            versions.commit();
            assert_eq!(versions.committed(0), versions.newest(0));
        }
        assert_eq!(slots, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]);
    }

    /// Catches: a tile that no commit holds named by one, or written to a place that it does not have.
    #[test]
    fn what_no_commit_names_has_one_place() {
        let versions = Versions::new([false, true].into_iter());
        for crc in 0..3 {
            versions.begin(1, crc);
            assert_eq!(versions.begin(0, crc).0.slot, 0);
            versions.commit();
            assert_eq!(versions.committed(0), None);
            assert_eq!(versions.all()[0], None);
            assert!(versions.all()[1].is_some());
        }
        versions.roll_back();
        assert_eq!(versions.newest(0), None);
        versions.adopt(&[Some(Version { slot: 1, crc: 5 }); 2]);
        assert_eq!(versions.committed(0), None);
        assert_eq!(versions.begin(0, 6).0.slot, 0);
    }

    /// Catches: a version taken back that no commit names, which has no other place; one that stays; and one that was
    /// never written before and is still there.
    #[test]
    fn taking_back_leaves_alone_what_has_one_place() {
        let versions = Versions::new([true, false, true].into_iter());
        versions.begin(0, 1);
        versions.commit();
        for (tile, crc) in [(0, 2), (1, 3), (2, 4)] {
            versions.begin(tile, crc);
        }
        versions.take_back();
        assert_eq!(versions.newest(0), Some(Version { slot: 0, crc: 1 }));
        assert_eq!(versions.newest(1), Some(Version { slot: 0, crc: 3 }));
        assert_eq!(versions.newest(2), None);
        assert_eq!(versions.begin(0, 5).0.slot, 1);
    }

    #[test]
    fn rolling_back_brings_the_committed_version() {
        let versions = Versions::new([true, true].into_iter());
        versions.begin(0, 7);
        versions.commit();
        versions.begin(0, 8);
        versions.begin(1, 9);
        versions.roll_back();
        assert_eq!(versions.newest(0), Some(Version { slot: 0, crc: 7 }));
        assert_eq!(versions.newest(1), None);
    }
}

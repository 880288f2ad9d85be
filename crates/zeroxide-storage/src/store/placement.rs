//! Where every tile of every block lies: which directory, and at which offset of its file.

use std::collections::HashMap;
use std::ops::Range;

use zeroxide_layout::{BlockId, PAGE};

use crate::error::StorageError;

/// One block to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSpec {
    /// Its identity.
    pub id: BlockId,
    /// Its size in bytes, a positive multiple of 4096.
    pub bytes: u64,
    /// The size of its tiles in bytes, a positive multiple of 4096. The last tile may be shorter.
    pub tile_bytes: u64,
    /// Commits name its tiles, so that a store that makes some has two places for each of them.
    pub committed: bool,
}

/// Where one tile lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Home {
    /// Index of the directory.
    pub(super) directory: usize,
    /// Offset in bytes, a multiple of 4096: in the directory's file, or, where commits name the tile, in what the file
    /// holds of such tiles.
    pub(super) offset: u64,
    /// Commits name it.
    pub(super) committed: bool,
    /// Length in bytes; a multiple of 4096.
    pub(super) length: usize,
}

/// The homes of all tiles. Tiles are dealt out one after another, each to the directory that holds the
/// fewest bytes of its share so far, so neighbours lie on different disks, and all disks are done at about the same
/// time with what is spread over them.
#[derive(Debug)]
pub(super) struct Placement {
    /// The tiles of each block, as a range of `homes`.
    tiles: HashMap<BlockId, Range<usize>>,
    homes: Vec<Home>,
    /// Bytes of each directory, one version of every tile.
    bytes: Vec<u64>,
    /// Of these the bytes of tiles that no commit names, which a file begins with. Versions of the others follow.
    uncommitted: Vec<u64>,
}

impl Placement {
    /// Lays blocks out over as many directories as there are `shares`, each of which gets bytes in proportion to its
    /// own, a positive number.
    pub(super) fn new(blocks: &[BlockSpec], shares: &[u64]) -> Result<Self, StorageError> {
        let mut tiles = HashMap::with_capacity(blocks.len());
        let mut homes = Vec::new();
        let mut bytes = vec![0_u64; shares.len()];
        let mut uncommitted = vec![0_u64; shares.len()];
        for spec in blocks {
            let first = homes.len();
            check(spec)?;
            let mut start = 0;
            while start < spec.bytes {
                let length = spec.tile_bytes.min(spec.bytes - start);
                let (directory, used) = bytes
                    .iter_mut()
                    .enumerate()
                    .min_by(|(one, used), (other, taken)| {
                        // used / share against taken / share, without a division.
                        let product =
                            |bytes: u64, share: u64| u128::from(bytes) * u128::from(share);
                        product(**used, shares[*other]).cmp(&product(**taken, shares[*one]))
                    })
                    .ok_or_else(|| refuse(spec, "there is no directory to put it in"))?;
                let before = &mut uncommitted[directory];
                let home = Home {
                    directory,
                    offset: if spec.committed {
                        *used - *before
                    } else {
                        *before
                    },
                    committed: spec.committed,
                    length: usize::try_from(length)
                        .map_err(|_| refuse(spec, "a tile does not fit the address space"))?,
                };
                *used = used
                    .checked_add(length)
                    .filter(|end| i64::try_from(*end).is_ok())
                    .ok_or_else(|| refuse(spec, "the file would be larger than a file can be"))?;
                if !spec.committed {
                    *before += length;
                }
                homes.push(home);
                start += length;
            }
            if tiles.insert(spec.id, first..homes.len()).is_some() {
                return Err(refuse(spec, "it is listed twice"));
            }
        }
        Ok(Self {
            tiles,
            homes,
            bytes,
            uncommitted,
        })
    }

    /// How many tiles a block has.
    pub(super) fn tiles(&self, block: BlockId) -> Option<u32> {
        // `check` keeps the number of tiles within a u32.
        self.tiles
            .get(&block)
            .map(|range| u32::try_from(range.len()).unwrap_or(u32::MAX))
    }

    /// The index over all tiles, and the home, of one tile.
    pub(super) fn find(&self, block: BlockId, tile: u32) -> Result<(usize, Home), StorageError> {
        let range = self.tiles.get(&block).cloned().unwrap_or_default();
        let tiles = u32::try_from(range.len()).unwrap_or(u32::MAX);
        let index = if tile < tiles {
            range.start + tile as usize
        } else {
            usize::MAX
        };
        match self.homes.get(index) {
            Some(home) => Ok((index, *home)),
            None => Err(StorageError::UnknownTile { block, tile, tiles }),
        }
    }

    /// How many tiles there are in all.
    pub(super) fn len(&self) -> usize {
        self.homes.len()
    }

    /// Bytes of each directory's file with so many versions of what commits name.
    pub(super) fn bytes(&self, slots: u64) -> impl Iterator<Item = u64> {
        let each = self.bytes.iter().zip(&self.uncommitted);
        each.map(move |(bytes, once)| once + (bytes - once) * slots)
    }

    /// Which tiles commits name.
    pub(super) fn committed(&self) -> impl Iterator<Item = bool> {
        self.homes.iter().map(|home| home.committed)
    }

    /// Where in its file a version of a tile lies.
    pub(super) fn offset(&self, home: Home, slot: u8) -> u64 {
        if !home.committed {
            return home.offset;
        }
        let once = self.uncommitted[home.directory];
        once + u64::from(slot) * (self.bytes[home.directory] - once) + home.offset
    }
}

/// A share of each of `directories` directories.
pub(super) fn shares_of(given: &[u64], directories: usize) -> Result<Vec<u64>, StorageError> {
    if given.is_empty() {
        return Ok(vec![1; directories]);
    }
    if given.len() == directories && !given.contains(&0) {
        return Ok(given.to_vec());
    }
    Err(StorageError::Shares {
        expected: directories,
        got: given.len(),
    })
}

fn check(spec: &BlockSpec) -> Result<(), StorageError> {
    let page = PAGE as u64;
    for (what, bytes) in [("size", spec.bytes), ("tile size", spec.tile_bytes)] {
        if bytes == 0 || !bytes.is_multiple_of(page) {
            let reason =
                format!("its {what} of {bytes} bytes is not a positive multiple of {PAGE}");
            return Err(refuse(spec, reason));
        }
    }
    let tiles = spec.bytes.div_ceil(spec.tile_bytes);
    if u32::try_from(tiles).is_err() {
        return Err(refuse(
            spec,
            format!("{tiles} tiles are more than a u32 can number"),
        ));
    }
    Ok(())
}

fn refuse(spec: &BlockSpec, reason: impl Into<String>) -> StorageError {
    StorageError::Layout {
        block: spec.id,
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zeroxide_layout::StateKey;

    use super::*;

    fn spec(unit: u32, pages: u64, tile_pages: u64) -> BlockSpec {
        BlockSpec {
            id: BlockId {
                unit,
                key: StateKey::new("exp_avg"),
            },
            bytes: pages * PAGE as u64,
            tile_bytes: tile_pages * PAGE as u64,
            committed: true,
        }
    }

    proptest! {
        #[test]
        fn tiles_cover_each_block_and_never_overlap(
            sizes in prop::collection::vec((1_u64..40, 1_u64..9), 1..12),
            shares in prop::collection::vec(1_u64..2000, 1..5),
        ) {
            let directories = shares.len();
            let blocks: Vec<_> = sizes
                .iter()
                .zip(0_u32..)
                .map(|((pages, tile), unit)| spec(unit, *pages, *tile))
                .collect();
            let placement = Placement::new(&blocks, &shares).expect("valid blocks");
            let mut taken: Vec<Vec<Range<u64>>> = vec![Vec::new(); directories];
            for block in &blocks {
                let tiles = placement.tiles(block.id).expect("listed");
                let mut covered = 0;
                for tile in 0..tiles {
                    let (_, home) = placement.find(block.id, tile).expect("in range");
                    prop_assert_eq!(home.offset % PAGE as u64, 0);
                    let length = home.length as u64;
                    prop_assert!(length == block.tile_bytes || tile + 1 == tiles);
                    taken[home.directory].push(home.offset..home.offset + length);
                    covered += length;
                }
                prop_assert_eq!(covered, block.bytes);
                prop_assert!(placement.find(block.id, tiles).is_err());
            }
            let largest_tile = blocks.iter().map(|block| block.tile_bytes).max().unwrap_or(0);
            for (ranges, bytes) in taken.iter_mut().zip(placement.bytes(1)) {
                ranges.sort_by_key(|range| range.start);
                let mut end = 0;
                for range in ranges {
                    prop_assert_eq!(range.start, end, "a gap or an overlap");
                    end = range.end;
                }
                prop_assert_eq!(end, bytes);
            }
            // The last tile of a directory came when no other was less full: without it, it is not the fullest.
            let all: Vec<u64> = placement.bytes(1).collect();
            for (bytes, share) in all.iter().zip(&shares) {
                let before = u128::from(bytes.saturating_sub(largest_tile));
                for (others, of) in all.iter().zip(&shares) {
                    let fuller = before * u128::from(*of) > u128::from(*others) * u128::from(*share);
                    prop_assert!(!fuller, "directories are unevenly filled");
                }
            }
        }
    }

    #[test]
    fn neighbouring_tiles_lie_in_different_directories() {
        let placement = Placement::new(&[spec(0, 8, 1)], &[7, 7]).expect("valid");
        let homes: Vec<_> = (0..8)
            .map(|tile| {
                placement
                    .find(spec(0, 8, 1).id, tile)
                    .expect("in range")
                    .1
                    .directory
            })
            .collect();
        assert_eq!(homes, [0, 1, 0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn a_disk_that_is_three_times_as_fast_gets_three_times_as_much() {
        let placement = Placement::new(&[spec(0, 400, 1)], &[1500, 500]).expect("valid");
        let page = PAGE as u64;
        assert_eq!(
            placement.bytes(1).collect::<Vec<_>>(),
            [300 * page, 100 * page]
        );
    }

    /// Catches: two places for what no commit names, and places that overlap.
    #[test]
    fn what_no_commit_names_has_one_place_beside_two_of_all_else() {
        let once = BlockSpec {
            committed: false,
            ..spec(1, 7, 2)
        };
        let blocks = [spec(0, 9, 2), once, spec(2, 5, 1)];
        let placement = Placement::new(&blocks, &[1, 1]).expect("valid");
        let mut taken: Vec<Vec<Range<u64>>> = vec![Vec::new(); 2];
        for block in &blocks {
            for tile in 0..placement.tiles(block.id).expect("listed") {
                let (_, home) = placement.find(block.id, tile).expect("in range");
                assert_eq!(home.committed, block.committed);
                for slot in 0..=u8::from(block.committed) {
                    let start = placement.offset(home, slot);
                    taken[home.directory].push(start..start + home.length as u64);
                }
            }
        }
        let page = PAGE as u64;
        assert_eq!(placement.bytes(2).sum::<u64>(), (9 + 7 + 9 + 5 + 5) * page);
        for (mut ranges, bytes) in taken.into_iter().zip(placement.bytes(2)) {
            ranges.sort_by_key(|range| range.start);
            let mut end = 0;
            for range in ranges {
                assert_eq!(range.start, end, "a gap or an overlap");
                end = range.end;
            }
            assert_eq!(end, bytes);
        }
    }

    #[test]
    fn impossible_blocks_are_refused_by_name() {
        let odd = BlockSpec {
            bytes: 4097,
            ..spec(3, 1, 1)
        };
        let no_tile = BlockSpec {
            tile_bytes: 0,
            ..spec(3, 1, 1)
        };
        let huge = BlockSpec {
            bytes: u64::MAX - 4095,
            tile_bytes: 1 << 62,
            ..spec(3, 1, 1)
        };
        let many = BlockSpec {
            bytes: 1 << 50,
            ..spec(3, 1, 1)
        };
        for (bad, word) in [
            (odd, "4097"),
            (no_tile, "tile size"),
            (huge, "larger"),
            (many, "u32"),
        ] {
            let error = Placement::new(&[bad], &[1])
                .expect_err("must be refused")
                .to_string();
            assert!(error.contains("unit 3") && error.contains(word), "{error}");
        }
        let twice =
            Placement::new(&[spec(1, 1, 1), spec(1, 1, 1)], &[1]).expect_err("listed twice");
        assert!(twice.to_string().contains("twice"), "{twice}");
    }
}

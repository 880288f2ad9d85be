//! The checksum of every tile, as last handed to the disk.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crc_fast::CrcAlgorithm;

/// CRC-64/NVME (polynomial `0xad93d23594c93659`, reflected, as in the NVM Express specification) of
/// `bytes`.
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// One checksum per tile; `None` where nothing was ever written.
#[derive(Debug)]
pub(super) struct Checksums {
    tiles: Mutex<Box<[Option<u64>]>>,
}

impl Checksums {
    pub(super) fn new(tiles: usize) -> Self {
        Self {
            tiles: Mutex::new(vec![None; tiles].into_boxed_slice()),
        }
    }

    pub(super) fn get(&self, tile: usize) -> Option<u64> {
        self.lock().get(tile).copied().flatten()
    }

    /// Sets a tile's checksum and returns the one before.
    pub(super) fn replace(&self, tile: usize, checksum: Option<u64>) -> Option<u64> {
        self.lock()
            .get_mut(tile)
            .and_then(|slot| std::mem::replace(slot, checksum))
    }

    fn lock(&self) -> MutexGuard<'_, Box<[Option<u64>]>> {
        // Each slot is written in one assignment, so a panic elsewhere leaves nothing half done.
        self.tiles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn checksum_has_the_published_check_value() {
        // The check value of CRC-64/NVME over "123456789" in the RevEng catalogue.
        assert_eq!(checksum(b"123456789"), 0xae8b_1486_0a79_9888);
    }
}

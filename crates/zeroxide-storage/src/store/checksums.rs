//! The checksum of a tile.

use crc_fast::CrcAlgorithm;

/// Bytes of a piece: what one thread takes the checksum of at a time.
pub const CHECKSUM_PIECE: usize = 64 << 10;

/// Bytes that are copied before their checksum is taken: they fit into a core's first cache.
const COPY_PIECE: usize = 16 << 10;

/// The checksum of a tile, or of any bytes: CRC-64/NVME (polynomial `0xad93d23594c93659`, reflected, as in the NVM
/// Express specification). Beyond one piece it is that of the checksums of all pieces, 8 bytes each, little-endian, in
/// order, so that several threads can share the work and none has to go twice over the bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    join_checksums(bytes.chunks(CHECKSUM_PIECE).map(crc))
}

/// The checksum of bytes whose [pieces](CHECKSUM_PIECE) have these checksums.
pub fn join_checksums(pieces: impl IntoIterator<Item = u64>) -> u64 {
    let mut pieces = pieces.into_iter();
    let Some(first) = pieces.next() else {
        return crc(&[]);
    };
    let Some(second) = pieces.next() else {
        return first;
    };
    let mut digest = crc_fast::Digest::new(CrcAlgorithm::Crc64Nvme);
    for piece in [first, second].into_iter().chain(pieces) {
        digest.update(&piece.to_le_bytes());
    }
    digest.finalize()
}

/// CRC-64/NVME of bytes that come one part after the other, as a file of a checkpoint does: the standard's, of all of
/// them at once, unlike [`checksum`] of more than a piece.
#[derive(Debug, Clone)]
pub struct RunningChecksum(crc_fast::Digest);

impl RunningChecksum {
    /// Of no bytes yet.
    pub fn new() -> Self {
        Self(crc_fast::Digest::new(CrcAlgorithm::Crc64Nvme))
    }

    /// Takes in what comes next.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Copies what comes next and takes it in while it is in the nearest cache.
    ///
    /// # Panics
    ///
    /// Where the lengths differ.
    pub fn copy(&mut self, from: &[u8], into: &mut [u8]) {
        assert_eq!(from.len(), into.len(), "as many bytes as there is room for");
        for (from, into) in from.chunks(COPY_PIECE).zip(into.chunks_mut(COPY_PIECE)) {
            into.copy_from_slice(from);
            self.0.update(into);
        }
    }

    /// The checksum of what came so far.
    pub fn value(&self) -> u64 {
        self.0.finalize()
    }
}

impl Default for RunningChecksum {
    fn default() -> Self {
        Self::new()
    }
}

fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

#[cfg(test)]
mod tests {
    use super::{CHECKSUM_PIECE, COPY_PIECE, RunningChecksum, checksum, join_checksums};

    /// Catches: pieces joined out of order, a piece left out, a length that several pieces share taken for one.
    #[test]
    fn pieces_in_order_have_the_checksum_of_the_whole() {
        for len in [
            0,
            1,
            CHECKSUM_PIECE - 1,
            CHECKSUM_PIECE,
            CHECKSUM_PIECE + 1,
            3 * CHECKSUM_PIECE + 5,
        ] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251).to_le_bytes()[0]).collect();
            let mut pieces: Vec<u64> = bytes.chunks(CHECKSUM_PIECE).map(checksum).collect();
            assert_eq!(
                join_checksums(pieces.iter().copied()),
                checksum(&bytes),
                "{len} bytes"
            );
            if pieces.len() > 1 {
                pieces.swap(0, 1);
                assert_ne!(
                    join_checksums(pieces.iter().copied()),
                    checksum(&bytes),
                    "{len} bytes"
                );
            }
        }
    }

    #[test]
    fn checksum_has_the_published_check_value() {
        // The check value of CRC-64/NVME over "123456789" in the RevEng catalogue.
        assert_eq!(checksum(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    /// Catches: a part left out or taken in twice, a copy that is not what was taken in, pieces joined as tiles are.
    #[test]
    fn parts_have_the_standards_checksum_of_all() {
        let bytes: Vec<u8> = (0..5 * COPY_PIECE + 77)
            .map(|i| (i * 31 % 251).to_le_bytes()[0])
            .collect();
        let expected = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &bytes);
        for part in [1000, COPY_PIECE, 3 * COPY_PIECE + 1, bytes.len()] {
            let mut taken = RunningChecksum::new();
            let mut copied = RunningChecksum::default();
            let mut copy = vec![0; bytes.len()];
            for (from, into) in bytes.chunks(part).zip(copy.chunks_mut(part)) {
                taken.update(from);
                copied.copy(from, into);
            }
            assert_eq!(taken.value(), expected, "parts of {part}");
            assert_eq!(copied.value(), expected, "parts of {part}");
            assert_eq!(copy, bytes);
        }
        assert_eq!(RunningChecksum::new().value(), checksum(&[]));
    }
}

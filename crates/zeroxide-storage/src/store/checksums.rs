//! The checksum of a tile.

use crc_fast::CrcAlgorithm;

/// Bytes of a piece: what one thread takes the checksum of at a time.
pub const CHECKSUM_PIECE: usize = 64 << 10;

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

fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

#[cfg(test)]
mod tests {
    use super::{CHECKSUM_PIECE, checksum, join_checksums};

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
}

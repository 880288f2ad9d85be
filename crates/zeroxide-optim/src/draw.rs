//! Random bits for rounding, as a function of what is rounded: the same for any instruction set, thread count, slice,
//! shard, home or resume.
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"). Its
//! key is the parameter's stream, its counter the block of elements in the parameter and the number of the update. Each
//! element has one word, of which every tensor of it takes its own bits.

use zeroxide_layout::STATE_BLOCK;

/// Which random bits an update rounds with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Draw {
    /// The parameter's own stream, made of a seed and its name.
    pub stream: u64,
    /// Updates of the parameter before this one.
    pub updates: u64,
    /// The element of the parameter that the slices start at, a multiple of [`STATE_BLOCK`].
    pub first: u64,
}

/// One word for each element of a block.
pub(crate) type Words = [u32; STATE_BLOCK];

/// Counters that are worked on side by side: each yields four words.
const LANES: usize = STATE_BLOCK / 4;

impl Draw {
    /// The words for block number `block` of the slices. Word `i` is word `i / 16` of counter `i % 16`.
    #[inline(always)]
    pub(crate) fn words(&self, block: usize) -> Words {
        let block = self.first / STATE_BLOCK as u64 + block as u64;
        let (low, high) = halves(block);
        let (updates, more) = halves(self.updates);
        let (mut key0, mut key1) = halves(self.stream);
        // Each word in the lower half of 64 bits, where products of two words are taken; what is above is left out there.
        let (mut c0, mut c1) = ([low; LANES], [high; LANES]);
        let (mut c2, mut c3) = ([0; LANES], [updates; LANES]);
        for (word, lane) in c2.iter_mut().zip(0..) {
            *word = (more << 16) | lane;
        }
        for _ in 0..10 {
            let lanes = c0.iter_mut().zip(&mut c1).zip(&mut c2).zip(&mut c3);
            for (((c0, c1), c2), c3) in lanes {
                let first = (*c0 & WORD) * 0xD251_1F53;
                let second = (*c2 & WORD) * 0xCD9E_8D57;
                (*c0, *c1) = ((second >> 32) ^ *c1 ^ key0, second);
                (*c2, *c3) = ((first >> 32) ^ *c3 ^ key1, first);
            }
            key0 = (key0 + 0x9E37_79B9) & WORD;
            key1 = (key1 + 0xBB67_AE85) & WORD;
        }
        let mut words = [0; STATE_BLOCK];
        for (row, from) in words.chunks_exact_mut(LANES).zip([c0, c1, c2, c3]) {
            for (word, wide) in row.iter_mut().zip(from) {
                *word = lower(wide);
            }
        }
        words
    }
}

/// The bits of a word.
const WORD: u64 = 0xffff_ffff;

/// The lower word.
#[expect(clippy::cast_possible_truncation, reason = "the upper one is left out")]
#[inline(always)]
fn lower(value: u64) -> u32 {
    value as u32
}

/// The lower and the upper word.
#[inline(always)]
fn halves(value: u64) -> (u64, u64) {
    (value & WORD, value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' library, Random123, for Philox4x32-10: counter and key of zeros, and of the
    /// digits of pi as far as this counter can have them. Catches: a round too few, a multiplier or key increment that
    /// is another one, words in another order.
    #[test]
    fn the_words_are_those_of_the_published_generator() {
        let words = Draw::default().words(0);
        let first = [words[0], words[16], words[32], words[48]];
        assert_eq!(first, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let pi = Draw {
            stream: 0x299f_31d0_a409_3822,
            updates: 0x0000_1319_0370_7344,
            first: 0x85a3_08d3_243f_6a88 << 6,
        };
        // Block 0x01a3_08d3_243f_6a88 after the shift: as a slow, plain Philox has it.
        let words = pi.words(0);
        for lane in [0_u32, 5, 15] {
            let block = pi.first / STATE_BLOCK as u64;
            let (low, high) = (lower(block), lower(block >> 32));
            let counter = [low, high, 0x1319_0000 | lane, 0x0370_7344];
            let expected = plain(counter, [0xa409_3822, 0x299f_31d0]);
            let at = lane as usize;
            let got = [words[at], words[at + 16], words[at + 32], words[at + 48]];
            assert_eq!(got, expected, "lane {lane}");
        }
    }

    /// The published answer for the digits of pi holds for the plain generator that the lanes are compared with.
    #[test]
    fn the_plain_generator_has_the_published_answer() {
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let key = [0xa409_3822, 0x299f_31d0];
        let expected = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(plain(counter, key), expected);
    }

    fn plain(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
        for _ in 0..10 {
            let product = |factor: u64, word: u32| {
                let wide = factor * u64::from(word);
                ((wide >> 32) as u32, (wide & 0xffff_ffff) as u32)
            };
            let (high0, low0) = product(0xD251_1F53, counter[0]);
            let (high1, low1) = product(0xCD9E_8D57, counter[2]);
            counter = [
                high1 ^ counter[1] ^ key[0],
                low1,
                high0 ^ counter[3] ^ key[1],
                low0,
            ];
            key = [
                key[0].wrapping_add(0x9E37_79B9),
                key[1].wrapping_add(0xBB67_AE85),
            ];
        }
        counter
    }
}

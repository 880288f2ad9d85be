//! Frozen parameters as bytes, against the bytes that were given.

mod harness;

use harness::{Case, UNITS, step};
use zeroxide_offload::{OffloadError, StateHome, WeightHome};

/// Every pattern of 16 bits, over and over, from another start in each parameter.
fn pattern(unit: usize, param: usize, words: u64, seed: u64) -> Vec<u8> {
    let start = (unit as u64 * 7919 + param as u64 * 104_729 + seed) % 65_536;
    (start..start + words)
        .flat_map(|word| {
            u16::try_from(word % 65_536)
                .expect("a remainder")
                .to_le_bytes()
        })
        .collect()
}

fn frozen() -> impl Iterator<Item = (usize, usize, u64)> {
    UNITS.iter().enumerate().flat_map(|(unit, params)| {
        params
            .iter()
            .enumerate()
            .filter(|(_, (_, trainable))| !trainable)
            .map(move |(param, (words, _))| (unit, param, *words))
    })
}

fn cases() -> impl Iterator<Item = Case> {
    [WeightHome::Host, WeightHome::Disk, WeightHome::Shard]
        .into_iter()
        .flat_map(|weights| {
            [StateHome::Host, StateHome::Disk].map(|state| Case {
                weights,
                state,
                ..Case::default()
            })
        })
}

/// Catches: a conversion on the way in or out, a byte lost where a call starts or ends inside a word or at a tile.
#[test]
fn bytes_come_back_as_they_were_given_whatever_is_trained_beside_them() {
    for case in cases() {
        let offload = case.try_open().expect("room");
        for (unit, params) in UNITS.iter().enumerate() {
            offload.fill_begin(unit, "weight").expect("fill");
            for (param, (words, trainable)) in params.iter().enumerate() {
                if *trainable {
                    continue;
                }
                let bytes = pattern(unit, param, *words, 0);
                // In pieces of odd sizes, so that some start in the middle of a word.
                for (at, piece) in bytes.chunks(77).enumerate() {
                    offload
                        .fill_bytes(unit, param, at as u64 * 77, piece)
                        .expect("inside");
                }
            }
            offload.fill_commit(unit).expect("written");
        }
        for index in 0..2 {
            step(&offload, index).expect("no fault was asked for");
        }
        for (unit, param, words) in frozen() {
            let expected = pattern(unit, param, words, 0);
            let mut found = vec![0_u8; expected.len()];
            for (at, piece) in found.chunks_mut(999).enumerate() {
                offload
                    .read_bytes(unit, param, at as u64 * 999, piece)
                    .expect("inside");
            }
            assert_eq!(found, expected, "{:?} {:?}", case.weights, case.state);
        }
    }
}

/// Catches: an edit that reaches the window and not the disk, or the other way, and one that takes neighbours with it.
#[test]
fn replaced_bytes_leave_everything_else_as_it_is() {
    for case in cases() {
        let offload = case.open();
        let mut expected = Vec::new();
        for (unit, param, words) in frozen() {
            let mut bytes = vec![0_u8; pattern(unit, param, words, 5).len()];
            offload
                .read_bytes(unit, param, 0, &mut bytes)
                .expect("inside");
            // From a byte in the middle of a word to one in the middle of the last word.
            let end = bytes.len() - 1;
            let new = pattern(unit, param, words, 5);
            bytes[101..end].copy_from_slice(&new[101..end]);
            offload.gather(unit, false).expect("room");
            offload
                .write_bytes(unit, param, 101, &new[101..end])
                .expect("inside");
            offload.release(unit).expect("held");
            expected.push(bytes);
        }
        let check = || {
            for ((unit, param, _), expected) in frozen().zip(&expected) {
                let mut found = vec![0_u8; expected.len()];
                offload
                    .read_bytes(unit, param, 0, &mut found)
                    .expect("inside");
                assert!(&found == expected, "{:?} {:?}", case.weights, case.state);
            }
        };
        check();
        step(&offload, 0).expect("no fault was asked for");
        check();
    }
}

#[test]
fn trainable_parameters_and_bytes_outside_are_refused() {
    let offload = Case::default().open();
    let mut out = [0_u8; 8];
    for (unit, param, start) in [(0, 0, 0), (0, 2, 2 * 3001 - 7)] {
        for outcome in [
            offload.read_bytes(unit, param, start, &mut out),
            offload.write_bytes(unit, param, start, &[0; 8]),
        ] {
            assert!(matches!(outcome, Err(OffloadError::Misuse { .. })));
        }
    }
    let outside = offload.fill_bytes(0, 2, 0, &[0; 8]);
    assert!(matches!(outside, Err(OffloadError::Misuse { .. })));
}

//! Headers and manifests that somebody or something has changed: deterministic mutations of the files in `corpus/`.
//!
//! Half of the mutants get a checksum that fits, so that what is behind it is reached as well. No mutant may end in a
//! panic, and one that is accepted says what the text that it came from says, or has a checksum that was made to fit.
//! An input that once did otherwise is kept in `corpus/`, where every run begins.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::checksums::checksum;
use super::header::{self, Header};
use super::manifest::{self, Manifest};

/// Random numbers of a seed (xorshift64*, Vigna 2016, "An experimental exploration of Marsaglia's xorshift generators").
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(high).expect("31 bits") % bound.max(1)
    }
}

/// Pieces that parsers of such text stumble over.
const WORDS: [&[u8]; 14] = [
    b"-1",
    b"18446744073709551616",
    b"1e400",
    b"null",
    b"[[[[[[[[",
    b"{\"a\":",
    b"\\ud800",
    b"\xff\xfe",
    b"\n",
    b"\0",
    b"\"generation\":0,",
    b"[2,0]",
    b"0.5",
    b"zeroxide-commit 1 ",
];

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + random.below(24)).min(bytes.len());
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 => bytes.truncate(at),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let word = WORDS[random.below(WORDS.len())];
                bytes.splice(at..end.min(at + random.below(4)), word.iter().copied());
            }
            4 => {
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            _ => {
                let digit = b"0123456789"[random.below(10)];
                bytes.splice(at..end.min(at + 1), [digit]);
            }
        }
    }
}

/// Gives a mutant the checksum of its second line.
fn reseal(bytes: &mut Vec<u8>, magic: &str) {
    let body = bytes
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or(0, |line| line + 1);
    let body = bytes.split_off(body);
    let inner = body.strip_suffix(b"\n").unwrap_or(&body);
    *bytes = format!("{magic}{:016x}\n", checksum(inner)).into_bytes();
    bytes.extend_from_slice(inner);
    bytes.push(b'\n');
}

fn corpus(kind: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(kind);
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .expect("a folder of inputs")
        .map(|entry| entry.expect("readable").path())
        .map(|path| (path.clone(), std::fs::read(path).expect("readable")))
        .collect();
    found.sort();
    found
}

/// Tries mutants of the corpus for `time`: `look` reads one, and is told whether its checksum was made to fit.
fn fuzz(kind: &str, magic: &str, time: Duration, look: impl Fn(&[u8], &[u8], bool)) -> u64 {
    let inputs = corpus(kind);
    assert!(!inputs.is_empty(), "no inputs of {kind}");
    for (_, bytes) in &inputs {
        look(bytes, bytes, false);
    }
    let start = Instant::now();
    let mut random = Random(0x5eed);
    let mut tried = 0;
    while start.elapsed() < time {
        let (_, original) = &inputs[random.below(inputs.len())];
        let mut bytes = original.clone();
        mutate(&mut bytes, &mut random);
        let fits = random.below(2) == 1;
        if fits {
            reseal(&mut bytes, magic);
        }
        look(original, &bytes, fits);
        tried += 1;
    }
    tried
}

fn look_at_manifest(original: &[u8], bytes: &[u8], fits: bool) {
    let Ok(found) = manifest::parse(bytes) else {
        return;
    };
    if !fits {
        assert_eq!(
            manifest::parse(original).as_ref(),
            Ok(&found),
            "another one"
        );
    }
    // Whoever goes on from it must be able to: every slot is one of two.
    let (generation, tiles, blocks) = (found.generation, found.tiles.len(), found.blocks);
    if let Ok(found) = found.checked(generation, tiles, blocks) {
        for version in found.versions().into_iter().flatten() {
            assert!(version.slot < 2);
        }
    }
}

fn look_at_header(original: &[u8], bytes: &[u8], fits: bool) {
    let Ok(found) = header::parse(bytes) else {
        return;
    };
    if !fits {
        assert_eq!(header::parse(original).as_ref(), Ok(&found), "another one");
    }
    let known: Header = header::parse(original).unwrap_or_else(|_| found.clone());
    if found == known {
        assert_eq!(found.difference(&known), None);
    } else if found.facts == known.facts {
        assert!(found.difference(&known).is_some(), "{found:?}");
    }
    let _ = found.identity();
}

fn fuzz_both(time: Duration) {
    let manifests = fuzz("manifest", manifest::MAGIC, time, look_at_manifest);
    let headers = fuzz("header", header::MAGIC, time, look_at_header);
    println!("{manifests} manifests, {headers} headers");
    assert!(manifests > 100 && headers > 100);
}

/// Catches: a manifest without its checksum, a slot of three, a panic of the parser.
#[test]
fn mutants_are_refused_or_the_same() {
    fuzz_both(Duration::from_secs(1));
}

#[test]
#[ignore = "takes twenty minutes; run by hand"]
fn many_mutants_are_refused_or_the_same() {
    fuzz_both(Duration::from_mins(10));
}

/// The inputs of the corpus that are whole are read: the mutants come from something.
#[test]
fn the_corpus_has_whole_inputs() {
    let whole = |kind, parse: &dyn Fn(&[u8]) -> bool| corpus(kind).iter().any(|it| parse(&it.1));
    assert!(whole("manifest", &|bytes| manifest::parse(bytes).is_ok()));
    assert!(whole("header", &|bytes| header::parse(bytes).is_ok()));
    let example = Manifest {
        generation: 1,
        blocks: 2,
        tiles: vec![Some((0, 3)), None],
        note: "{}".into(),
    };
    let text = example.text().expect("plain").into_bytes();
    assert_eq!(manifest::parse(&text), Ok(example));
}

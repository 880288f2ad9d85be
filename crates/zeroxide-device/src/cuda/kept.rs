//! Machine code as a file keeps it: with all that it was made of, and a checksum of everything.
//!
//! A file holds its key, which is all that decides what the compiler makes, so that what was made of another source is
//! told apart, and a checksum, so that damage is noticed wherever it is.

use std::path::Path;
use std::{fs, io};

use crc_fast::CrcAlgorithm;

use super::compile::{Cubin, Source};
use super::error::{CudaError, Result, Version};

/// The first bytes of a file; the number goes up when what follows is laid out differently.
const MAGIC: &[u8; 16] = b"zeroxide cubin 2";
/// Key, log and machine code.
const PARTS: usize = 3;
/// The magic, a length for each part, and a checksum.
const HEADER: usize = MAGIC.len() + (PARTS + 1) * 8;

/// Machine code from the compiler or out of a file.
#[derive(Debug)]
pub struct Kept {
    pub(super) contents: Contents,
    /// The compiler that made it.
    pub compiler: Version,
    /// Whether a file had it.
    pub cached: bool,
    /// Why it could not be kept, where it could not: the code is right, and the next process compiles again.
    pub problem: Option<CudaError>,
}

impl Kept {
    /// The machine code.
    pub fn cubin(&self) -> &Cubin {
        &self.contents.cubin
    }

    /// What the compiler said when it made the code.
    pub fn log(&self) -> &str {
        &self.contents.log
    }

    /// The bytes of a file that [`read_cubin`] takes.
    pub fn file(&self) -> Vec<u8> {
        self.contents.file()
    }
}

/// The machine code in the file at `path`, if it is what some compiler made of that source for that architecture by
/// those options; None where there is no such file, or one of something else.
///
/// # Errors
/// [`CudaError::Damaged`] for a file that is not as it was written, or cannot be read.
pub fn read_cubin(
    path: &Path,
    source: &Source,
    architecture: u32,
    options: &[String],
) -> Result<Option<Kept>> {
    let damaged = |reason: String| CudaError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(damaged(error.to_string())),
    };
    let contents = Contents::of(&bytes)
        .ok_or_else(|| damaged(String::from("its checksum is not that of its bytes")))?;
    let kept = contents
        .compiler()
        .filter(|compiler| contents.key == key(*compiler, source, architecture, options))
        .map(|compiler| Kept {
            contents,
            compiler,
            cached: true,
            problem: None,
        });
    Ok(kept)
}

/// What a file holds.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) key: Vec<u8>,
    pub(super) log: String,
    pub(super) cubin: Cubin,
}

impl Contents {
    /// The contents of a file's bytes, if they are whole.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let (header, body) = bytes.split_at_checked(HEADER)?;
        let (magic, numbers) = header.split_at(MAGIC.len());
        let mut numbers = numbers.chunks_exact(8).map(number);
        let mut lengths = [0; PARTS];
        for length in &mut lengths {
            *length = usize::try_from(numbers.next()??).ok()?;
        }
        if magic != MAGIC || numbers.next()?? != sum(body) {
            return None;
        }
        let (key, rest) = body.split_at_checked(lengths[0])?;
        let (log, cubin) = rest.split_at_checked(lengths[1])?;
        (cubin.len() == lengths[2]).then_some(())?;
        Some(Self {
            key: key.to_vec(),
            log: str::from_utf8(log).ok()?.to_owned(),
            cubin: Cubin::new(cubin.to_vec())?,
        })
    }

    /// The bytes of a file.
    pub(super) fn file(&self) -> Vec<u8> {
        let parts: [&[u8]; PARTS] = [&self.key, self.log.as_bytes(), self.cubin.bytes()];
        let body = parts.concat();
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(MAGIC);
        for number in [
            parts[0].len() as u64,
            parts[1].len() as u64,
            parts[2].len() as u64,
            sum(&body),
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The compiler's version, which a key begins with.
    fn compiler(&self) -> Option<Version> {
        let (length, rest) = self.key.split_at_checked(8)?;
        let text = rest.get(..usize::try_from(number(length)?).ok()?)?;
        let (major, minor) = str::from_utf8(text).ok()?.split_once('.')?;
        Some(Version {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

pub(super) fn sum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// All that decides what the compiler makes, its version first, each with its length before it.
pub(super) fn key(
    compiler: Version,
    source: &Source,
    architecture: u32,
    options: &[String],
) -> Vec<u8> {
    let version = compiler.to_string();
    let target = format!("sm_{architecture}");
    let headers = source
        .headers
        .iter()
        .flat_map(|(name, text)| [name.as_str(), text]);
    let mut key = Vec::new();
    let mut put = |text: &str| {
        key.extend_from_slice(&(text.len() as u64).to_le_bytes());
        key.extend_from_slice(text.as_bytes());
    };
    [version.as_str(), &target, &source.name, &source.text]
        .into_iter()
        .for_each(&mut put);
    put(&options.len().to_string());
    options
        .iter()
        .map(String::as_str)
        .chain(headers)
        .for_each(put);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        Source {
            name: String::from("a.cu"),
            text: String::from("int x;"),
            headers: vec![(String::from("zx/a.cuh"), String::from("int y;"))],
        }
    }

    /// Catches: something that decides the code and is not in the key, and texts that run into one another.
    #[test]
    fn a_key_tells_everything_apart() {
        let version = Version {
            major: 13,
            minor: 0,
        };
        let options = [String::from("-x")];
        let mut keys = vec![
            key(version, &source(), 90, &options),
            key(
                Version {
                    major: 13,
                    minor: 1,
                },
                &source(),
                90,
                &options,
            ),
            key(version, &source(), 80, &options),
            key(version, &source(), 90, &[]),
            key(
                version,
                &source(),
                90,
                &[String::from("-"), String::from("x")],
            ),
        ];
        let changes: [fn(&mut Source); 5] = [
            |source| source.name.push('x'),
            |source| source.text.push('x'),
            |source| source.headers[0].0.push('x'),
            |source| source.headers[0].1.push('x'),
            |source| source.headers.clear(),
        ];
        for change in changes {
            let mut other = source();
            change(&mut other);
            keys.push(key(version, &other, 90, &options));
        }
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    fn cubin() -> Vec<u8> {
        let mut file = vec![7_u8; 64];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        // No tables.
        file[32..64].fill(0);
        file
    }

    fn contents(key: &[u8]) -> Contents {
        Contents {
            key: key.to_vec(),
            log: String::from("a log"),
            cubin: Cubin::new(cubin()).expect("it has no tables"),
        }
    }

    /// Every byte of a file counts, and so does its length.
    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let whole = contents(b"the key").file();
        let found = Contents::of(&whole).expect("it is whole");
        assert_eq!(
            (
                found.key.as_slice(),
                found.log.as_str(),
                found.cubin.bytes()
            ),
            (b"the key".as_slice(), "a log", cubin().as_slice())
        );
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            assert!(Contents::of(&damaged).is_none(), "byte {at}");
            assert!(Contents::of(&whole[..at]).is_none(), "the first {at} bytes");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert!(Contents::of(&longer).is_none());
    }

    /// Catches: code of another source, architecture or option that is taken for this one's, damage and a missing file
    /// that are taken for one another, and a compiler's version that is lost.
    #[test]
    fn a_file_is_read_for_what_it_was_made_of() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.cubin");
        let version = Version {
            major: 13,
            minor: 2,
        };
        let options = [String::from("-x")];
        assert!(
            read_cubin(&path, &source(), 90, &options)
                .expect("none")
                .is_none()
        );
        fs::write(
            &path,
            contents(&key(version, &source(), 90, &options)).file(),
        )
        .expect("written");
        let kept = read_cubin(&path, &source(), 90, &options)
            .expect("whole")
            .expect("of this source");
        assert_eq!(
            (kept.compiler, kept.log(), kept.cubin().bytes()),
            (version, "a log", cubin().as_slice())
        );
        let mut other = source();
        other.text.push(' ');
        for (source, architecture, options) in [
            (&other, 90, options.as_slice()),
            (&source(), 80, options.as_slice()),
            (&source(), 90, &[]),
        ] {
            assert!(
                read_cubin(&path, source, architecture, options)
                    .expect("whole")
                    .is_none()
            );
        }
        fs::write(&path, b"no file of ours").expect("written");
        let error = read_cubin(&path, &source(), 90, &options).expect_err("damaged");
        assert!(matches!(error, CudaError::Damaged { .. }), "{error}");
        // A key that begins with no version is no compiler's.
        fs::write(&path, contents(b"the key").file()).expect("written");
        assert!(
            read_cubin(&path, &source(), 90, &options)
                .expect("whole")
                .is_none()
        );
    }
}

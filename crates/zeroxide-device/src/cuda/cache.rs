//! Machine code that was compiled before, in a directory that any number of processes use at once.
//!
//! A file is named by a checksum of its key: all that decides what the compiler makes. It holds the key itself, so that
//! two keys of one checksum are told apart, and a checksum of everything, so that damage is noticed; both are compiled
//! anew. A file is written under a name of its own and renamed, so that readers see a whole one or none.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crc_fast::CrcAlgorithm;

use super::compile::{Compiler, Cubin, Source};
use super::error::{CudaError, Result, Version};

/// The first bytes of a file; the number goes up when what follows is laid out differently.
const MAGIC: &[u8; 16] = b"zeroxide cubin 1";
/// The magic, two lengths and a checksum.
const HEADER: usize = 16 + 3 * 8;

/// A directory of machine code.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

/// Machine code out of the cache or from the compiler.
#[derive(Debug)]
pub struct Kept {
    /// The machine code.
    pub cubin: Cubin,
    /// What the compiler said; empty where it was not asked.
    pub log: String,
    /// Whether it was there already.
    pub cached: bool,
    /// Why it could not be kept, where it could not: the code is right, and the next process compiles again.
    pub problem: Option<CudaError>,
}

impl Cache {
    /// A cache in `directory`, which is made when something is kept.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The machine code of a source, compiled where it is not there or damaged.
    ///
    /// # Errors
    /// Those of [`Compiler::compile`].
    pub fn compile(
        &self,
        compiler: &Compiler,
        source: &Source,
        architecture: u32,
        options: &[String],
    ) -> Result<Kept> {
        let key = key(compiler.version(), source, architecture, options);
        let path = self.directory.join(format!("{:016x}.cubin", sum(&key)));
        if let Some(cubin) = fs::read(&path)
            .ok()
            .and_then(|bytes| unpacked(&bytes, &key))
        {
            return Ok(Kept {
                cubin,
                log: String::new(),
                cached: true,
                problem: None,
            });
        }
        let fresh = compiler.compile(source, architecture, options)?;
        let problem = self.keep(&path, &packed(&key, fresh.cubin.bytes())).err();
        Ok(Kept {
            cubin: fresh.cubin,
            log: fresh.log,
            cached: false,
            problem,
        })
    }

    fn keep(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| CudaError::Cache {
                action,
                path,
                source,
            }
        };
        fs::create_dir_all(&self.directory).map_err(failed("create", &self.directory))?;
        let aside = self.directory.join(own_name());
        write(&aside, bytes)
            .map_err(failed("write", &aside))
            .and_then(|()| fs::rename(&aside, path).map_err(failed("rename to", path)))
            .inspect_err(|_| drop(fs::remove_file(&aside)))
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    File::create_new(path)?.write_all(bytes)
}

/// A name that no other process and no other call here uses, as long as processes of one number do not share the
/// directory from several machines; the time tells those apart.
fn own_name() -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |time| time.as_nanos());
    format!(".{}-{call}-{now:x}.new", std::process::id())
}

fn sum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// All that decides what the compiler makes, each with its length before it.
fn key(compiler: Version, source: &Source, architecture: u32, options: &[String]) -> Vec<u8> {
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

fn packed(key: &[u8], cubin: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(key.len() + cubin.len());
    body.extend_from_slice(key);
    body.extend_from_slice(cubin);
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(MAGIC);
    for number in [key.len() as u64, cubin.len() as u64, sum(&body)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&body);
    bytes
}

/// The machine code in a file's bytes, if they are whole and of this key.
fn unpacked(bytes: &[u8], key: &[u8]) -> Option<Cubin> {
    let (header, body) = bytes.split_at_checked(HEADER)?;
    let (magic, numbers) = header.split_at(MAGIC.len());
    let mut numbers = numbers.chunks_exact(8).map(|each| {
        let mut word = [0; 8];
        word.copy_from_slice(each);
        u64::from_le_bytes(word)
    });
    let lengths = [numbers.next()?, numbers.next()?];
    let expected = [
        key.len() as u64,
        (body.len() as u64).checked_sub(key.len() as u64)?,
    ];
    if magic != MAGIC || lengths != expected || numbers.next()? != sum(body) {
        return None;
    }
    let (found, cubin) = body.split_at(key.len());
    if found != key {
        return None;
    }
    Cubin::new(cubin.to_vec())
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

    /// Every byte of a file counts, and so does its length.
    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let (key, cubin) = (b"the key".as_slice(), cubin());
        let whole = packed(key, &cubin);
        assert_eq!(unpacked(&whole, key).expect("it is whole").bytes(), cubin);
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            assert!(unpacked(&damaged, key).is_none(), "byte {at}");
            assert!(
                unpacked(&whole[..at], key).is_none(),
                "the first {at} bytes"
            );
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert!(unpacked(&longer, key).is_none());
    }

    /// A file of another key with the same name, which a checksum of 64 bits can give.
    #[test]
    fn another_key_is_told_apart() {
        assert!(unpacked(&packed(b"one key", &cubin()), b"two key").is_none());
    }
}

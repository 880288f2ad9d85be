//! Sources become machine code, by NVRTC.

use std::ffi::CString;

use super::error::{CudaError, Result, Version};
use super::sys::nvrtc::{COMPILATION, INVALID_OPTION, Nvrtc, c_text, failure};

/// How kernels are compiled: no fused multiply-add but where a source says so, and division and square root as IEEE 754
/// has them, so that kernels compute the bits that the CPU computes. The log tells registers and spills of every kernel.
pub const OPTIONS: [&str; 6] = [
    "--std=c++17",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
    "--ptxas-options=-v",
];

/// A source with all that it may include.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// What messages call it.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Name, as it is included, and text of each header.
    pub headers: Vec<(String, String)>,
}

/// Machine code for one architecture: a whole ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin(Vec<u8>);

impl Cubin {
    /// Takes a file whose header and tables lie within it; the driver trusts them.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        const HEADER: usize = 64;
        let magic: &[u8] = &[0x7f, b'E', b'L', b'F', 2, 1];
        if bytes.len() < HEADER || !bytes.starts_with(magic) {
            return None;
        }
        let short = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let long = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        // Where the tables of segments and sections begin, and how long and how many their entries are.
        let tables = [
            (long(32), short(54), short(56)),
            (long(40), short(58), short(60)),
        ];
        let within = tables.iter().all(|(start, size, count)| {
            start
                .checked_add(size * count)
                .is_some_and(|end| end <= bytes.len() as u64)
        });
        within.then_some(Self(bytes))
    }

    /// The file.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What the compiler made of a source.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The machine code.
    pub cubin: Cubin,
    /// What the compiler said beside it, warnings among them.
    pub log: String,
}

/// NVRTC, found.
pub struct Compiler {
    nvrtc: Nvrtc,
    library: String,
}

impl Compiler {
    /// The first of `libraries`, paths or names, that can be loaded.
    pub fn open(libraries: &[String]) -> Result<Self> {
        let mut reason = String::from("no place to look in");
        for library in libraries {
            match Nvrtc::load(library) {
                Ok(nvrtc) => {
                    return Ok(Self {
                        nvrtc,
                        library: library.clone(),
                    });
                }
                Err(said) => reason = said,
            }
        }
        Err(CudaError::NoCompiler {
            tried: libraries.join(", "),
            reason,
        })
    }

    /// The compiler's version.
    pub fn version(&self) -> Version {
        self.nvrtc.version()
    }

    /// Where it was loaded from.
    pub fn library(&self) -> &str {
        &self.library
    }

    /// Compute capabilities that it compiles for, as 90 for 9.0.
    pub fn architectures(&self) -> &[u32] {
        self.nvrtc.architectures()
    }

    /// Compiles a source for the compute capability `architecture`, as 90 for 9.0.
    ///
    /// # Errors
    /// [`CudaError::UnknownArchitecture`], [`CudaError::Compile`] with all that the compiler said,
    /// [`CudaError::ZeroByte`], [`CudaError::Compiler`].
    pub fn compile(
        &self,
        source: &Source,
        architecture: u32,
        options: &[String],
    ) -> Result<Compiled> {
        if !self.architectures().contains(&architecture) {
            return Err(self.unknown(source, architecture));
        }
        let name = c_text("a source's name", &source.name)?;
        let text = c_text(&source.name, &source.text)?;
        let headers = source
            .headers
            .iter()
            .map(|(name, text)| Ok((c_text("a header's name", name)?, c_text(name, text)?)))
            .collect::<Result<Vec<_>>>()?;
        let target = format!("--gpu-architecture=sm_{architecture}");
        let options = [&target]
            .into_iter()
            .chain(options)
            .map(|option| c_text("an option", option))
            .collect::<Result<Vec<CString>>>()?;
        let outcome = self
            .nvrtc
            .compile(&name, &text, &headers, &options)
            .map_err(|failed| failure(&self.nvrtc, &source.name, failed))?;
        match outcome.status {
            0 => {
                let cubin = Cubin::new(outcome.cubin).ok_or_else(|| CudaError::Compiler {
                    call: "nvrtcGetCUBIN",
                    source_name: source.name.clone(),
                    nvrtc: self.version(),
                    reason: String::from("what it made is no machine code"),
                })?;
                Ok(Compiled {
                    cubin,
                    log: without_times(&outcome.log),
                })
            }
            COMPILATION | INVALID_OPTION => Err(CudaError::Compile {
                source_name: source.name.clone(),
                architecture,
                nvrtc: self.version(),
                log: one_line(&outcome.log, &self.nvrtc.reason(outcome.status)),
            }),
            status => {
                let reason = self.nvrtc.reason(status);
                Err(CudaError::Compiler {
                    call: "nvrtcCompileProgram",
                    source_name: source.name.clone(),
                    nvrtc: self.version(),
                    reason: [reason, one_line(&outcome.log, "it says no more")].join(": "),
                })
            }
        }
    }

    fn unknown(&self, source: &Source, architecture: u32) -> CudaError {
        let known: Vec<_> = self
            .architectures()
            .iter()
            .map(|each| format!("sm_{each}"))
            .collect();
        CudaError::UnknownArchitecture {
            source_name: source.name.clone(),
            architecture,
            known: known.join(", "),
            nvrtc: self.version(),
        }
    }
}

/// A log without what differs each time the same is compiled.
fn without_times(log: &str) -> String {
    log.lines()
        .filter(|line| !line.contains(": Compile time ="))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// The lines of a log in one, or what stands for a log that is empty.
fn one_line(log: &str, otherwise: &str) -> String {
    let lines: Vec<_> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        otherwise.to_owned()
    } else {
        lines.join(" | ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_one_line() {
        assert_eq!(
            one_line("a.cu(1): error\n\n   int x\n", "?"),
            "a.cu(1): error | int x"
        );
        assert_eq!(
            one_line("\n \n", "NVRTC_ERROR_COMPILATION"),
            "NVRTC_ERROR_COMPILATION"
        );
    }

    #[test]
    fn a_log_is_the_same_each_time() {
        assert_eq!(
            without_times("a\nptxas info    : Compile time = 1.5 ms\nb"),
            "a\nb\n"
        );
    }

    #[test]
    fn machine_code_has_its_tables_within_it() {
        let mut file = vec![0_u8; 128];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        assert!(Cubin::new(file.clone()).is_some());
        assert!(
            Cubin::new(file[..63].to_vec()).is_none(),
            "a header that ends early"
        );
        // One section of 64 bytes from byte 64 on is just within the file, and from byte 65 on is not.
        file[40] = 64;
        file[58] = 64;
        file[60] = 1;
        assert!(Cubin::new(file.clone()).is_some());
        file[40] = 65;
        assert!(Cubin::new(file.clone()).is_none());
        file[40..48].fill(0xff);
        assert!(
            Cubin::new(file).is_none(),
            "a start at the end of all numbers"
        );
        assert!(Cubin::new(vec![0; 128]).is_none());
    }
}

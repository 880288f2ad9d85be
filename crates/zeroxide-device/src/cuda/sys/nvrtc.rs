//! NVRTC's functions, with their types.
#![expect(unsafe_code, reason = "calls into NVIDIA's run-time compiler")]

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::Path;
use std::ptr;

use super::library::{Library, functions};
use crate::cuda::error::{CudaError, Result, Version};

/// The code for options that the compiler does not know, an architecture among them.
pub(crate) const INVALID_OPTION: c_int = 5;
/// The code for a source that is wrong.
pub(crate) const COMPILATION: c_int = 6;

functions! {
    /// What is used of NVRTC.
    Functions -> c_int {
        version = c"nvrtcVersion" (*mut c_int, *mut c_int);
        count_architectures = c"nvrtcGetNumSupportedArchs" (*mut c_int);
        architectures = c"nvrtcGetSupportedArchs" (*mut c_int);
        create = c"nvrtcCreateProgram" (
            *mut usize, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        );
        destroy = c"nvrtcDestroyProgram" (*mut usize);
        compile = c"nvrtcCompileProgram" (usize, c_int, *const *const c_char);
        log_bytes = c"nvrtcGetProgramLogSize" (usize, *mut usize);
        log = c"nvrtcGetProgramLog" (usize, *mut c_char);
        cubin_bytes = c"nvrtcGetCUBINSize" (usize, *mut usize);
        cubin = c"nvrtcGetCUBIN" (usize, *mut c_char);
    }
}

/// `nvrtcGetErrorString(code)`.
type ErrorText = unsafe extern "C" fn(c_int) -> *const c_char;

/// The compiler.
pub(crate) struct Nvrtc {
    functions: Functions,
    error_text: ErrorText,
    version: Version,
    architectures: Vec<u32>,
}

/// What the compiler made of a program.
pub(crate) struct Outcome {
    /// 0, or a code.
    pub(crate) status: c_int,
    /// All that it said.
    pub(crate) log: String,
    /// Machine code, where there is some.
    pub(crate) cubin: Vec<u8>,
}

/// A failed call: which, and its code.
pub(crate) type Failed = (&'static str, c_int);

/// A program, until it is dropped.
struct Program<'a> {
    functions: &'a Functions,
    handle: usize,
}

impl Nvrtc {
    /// Loads the compiler. Errors with what the loader or the library said.
    ///
    /// The compiler opens a second library by its name alone when it compiles. Where it comes by a path, those that lie
    /// beside it are loaded first, since the loader may not look there.
    pub(crate) fn load(name: &str) -> std::result::Result<Self, String> {
        for beside in beside(Path::new(name)) {
            // One that cannot be loaded may be one that is not needed: the compiler names what it misses.
            drop(Library::open(&beside));
        }
        let library = Library::open(name)?;
        let functions = Functions::of(&library).map_err(|error| error.to_string())?;
        let error_text = library
            .need(c"nvrtcGetErrorString")
            .map_err(|error| error.to_string())?;
        // SAFETY: a function of this name has this type in every NVRTC, and the library is never unloaded.
        let error_text =
            unsafe { std::mem::transmute::<*mut std::ffi::c_void, ErrorText>(error_text) };
        let mut compiler = Self {
            functions,
            error_text,
            version: Version { major: 0, minor: 0 },
            architectures: Vec::new(),
        };
        let failed = |(call, status): Failed| format!("{call}: {}", compiler.reason(status));
        let (version, architectures) = ask(&functions).map_err(failed)?;
        compiler.version = version;
        compiler.architectures = architectures;
        Ok(compiler)
    }

    /// The compiler's version.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Compute capabilities that it compiles for, as 90 for 9.0.
    pub(crate) fn architectures(&self) -> &[u32] {
        &self.architectures
    }

    /// Compiles `text`, in which `headers` (name, text) can be included.
    pub(crate) fn compile(
        &self,
        name: &CStr,
        text: &CStr,
        headers: &[(CString, CString)],
        options: &[CString],
    ) -> std::result::Result<Outcome, Failed> {
        let program = Program::new(&self.functions, name, text, headers)?;
        let status = program.compile(options);
        let log = program.bytes(
            ("nvrtcGetProgramLogSize", self.functions.log_bytes),
            ("nvrtcGetProgramLog", self.functions.log),
        )?;
        let log = String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .to_owned();
        let cubin = if status == 0 {
            program.bytes(
                ("nvrtcGetCUBINSize", self.functions.cubin_bytes),
                ("nvrtcGetCUBIN", self.functions.cubin),
            )?
        } else {
            Vec::new()
        };
        Ok(Outcome { status, log, cubin })
    }

    /// What a code means.
    pub(crate) fn reason(&self, status: c_int) -> String {
        // SAFETY: the function takes any number, and returns a text of the library's or null.
        let text = unsafe { (self.error_text)(status) };
        if text.is_null() {
            return format!("error {status}");
        }
        // SAFETY: the text ends with a zero byte and is there as long as the library, which is never unloaded.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }
}

/// Libraries that a compiler with this path may open by their names.
fn beside(path: &Path) -> Vec<String> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let entries = folder.and_then(|folder| fs::read_dir(folder).ok());
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("libnvrtc-builtins.so")
        })
        .map(|entry| entry.path().display().to_string())
        .collect()
}

/// The compiler's version and what it compiles for.
fn ask(functions: &Functions) -> std::result::Result<(Version, Vec<u32>), Failed> {
    let (mut major, mut minor, mut count) = (0, 0, 0);
    // SAFETY: the function fills in two numbers.
    check("nvrtcVersion", unsafe {
        (functions.version)(&raw mut major, &raw mut minor)
    })?;
    // SAFETY: the function fills in one number.
    check("nvrtcGetNumSupportedArchs", unsafe {
        (functions.count_architectures)(&raw mut count)
    })?;
    let mut found: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: the function fills in as many numbers as the one above has said.
    check("nvrtcGetSupportedArchs", unsafe {
        (functions.architectures)(found.as_mut_ptr())
    })?;
    let number = |each: c_int| u32::try_from(each).unwrap_or(0);
    let version = Version {
        major: number(major),
        minor: number(minor),
    };
    Ok((version, found.into_iter().map(number).collect()))
}

fn check(call: &'static str, status: c_int) -> std::result::Result<(), Failed> {
    if status == 0 {
        Ok(())
    } else {
        Err((call, status))
    }
}

/// Where each text begins.
fn addresses<'a>(texts: impl Iterator<Item = &'a CString>) -> Vec<*const c_char> {
    texts.map(|text| text.as_ptr()).collect()
}

/// A number of things, for a library that counts in `int`; more than it can count are refused by it as -1.
fn count(things: usize) -> c_int {
    c_int::try_from(things).unwrap_or(-1)
}

impl<'a> Program<'a> {
    fn new(
        functions: &'a Functions,
        name: &CStr,
        text: &CStr,
        headers: &[(CString, CString)],
    ) -> std::result::Result<Self, Failed> {
        let names = addresses(headers.iter().map(|(name, _)| name));
        let texts = addresses(headers.iter().map(|(_, text)| text));
        let mut handle = 0;
        // SAFETY: all texts end with zero bytes, and the two lists are as long as their number says. The compiler copies
        // them before it returns.
        check("nvrtcCreateProgram", unsafe {
            (functions.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                count(headers.len()),
                if texts.is_empty() {
                    ptr::null()
                } else {
                    texts.as_ptr()
                },
                if names.is_empty() {
                    ptr::null()
                } else {
                    names.as_ptr()
                },
            )
        })?;
        Ok(Self { functions, handle })
    }

    fn compile(&self, options: &[CString]) -> c_int {
        let options = addresses(options.iter());
        // SAFETY: the program is there until it is dropped, and the list is as long as its number says.
        unsafe { (self.functions.compile)(self.handle, count(options.len()), options.as_ptr()) }
    }

    /// What `fill` writes, as many bytes as `size` says.
    fn bytes(
        &self,
        size: (
            &'static str,
            unsafe extern "C" fn(usize, *mut usize) -> c_int,
        ),
        fill: (
            &'static str,
            unsafe extern "C" fn(usize, *mut c_char) -> c_int,
        ),
    ) -> std::result::Result<Vec<u8>, Failed> {
        let mut bytes = 0;
        // SAFETY: the function fills in one number for a program that is there.
        check(size.0, unsafe { size.1(self.handle, &raw mut bytes) })?;
        let mut text = vec![0_u8; bytes];
        // SAFETY: the function writes as many bytes as the one above has said.
        check(fill.0, unsafe {
            fill.1(self.handle, text.as_mut_ptr().cast())
        })?;
        Ok(text)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was made by `new` and is destroyed once.
        unsafe { (self.functions.destroy)(&raw mut self.handle) };
    }
}

/// An error of the compiler itself.
pub(crate) fn failure(compiler: &Nvrtc, source: &str, (call, status): Failed) -> CudaError {
    CudaError::Compiler {
        call,
        source_name: source.to_owned(),
        nvrtc: compiler.version(),
        reason: compiler.reason(status),
    }
}

/// Text for the compiler. Errors where it has a zero byte.
pub(crate) fn c_text(what: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|error| CudaError::ZeroByte {
        what: what.to_owned(),
        at: error.nul_position(),
    })
}

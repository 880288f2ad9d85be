//! A shared library that is loaded while the program runs.
#![expect(unsafe_code, reason = "calls of the dynamic loader")]

use std::ffi::{CStr, CString, c_void};

use crate::cuda::error::{CudaError, Result};

/// A library that is loaded, and stays so: its functions may be called until the process ends.
pub(super) struct Library {
    name: String,
    handle: *mut c_void,
}

impl Library {
    /// Loads a library by its path, or by its name from where the loader looks. Errors with what the loader said.
    pub(super) fn open(name: &str) -> std::result::Result<Self, String> {
        let text = CString::new(name).map_err(|error| error.to_string())?;
        // SAFETY: the name ends with a zero byte. What a library does when it is loaded is its own: this one is chosen
        // by its caller to be NVIDIA's.
        let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(last_error());
        }
        Ok(Self {
            name: name.to_owned(),
            handle,
        })
    }

    /// The name that it was loaded by.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where the function `name` is, if the library has one.
    pub(super) fn find(&self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is that of a library that is never unloaded, and the name ends with a zero byte.
        let found = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    /// As [`find`](Self::find), where the library is of no use without the function.
    pub(super) fn need(&self, name: &'static CStr) -> Result<*mut c_void> {
        self.find(name).ok_or_else(|| CudaError::NoEntry {
            library: self.name.clone(),
            entry: name.to_str().unwrap_or("?"),
        })
    }
}

/// What the loader said last on this thread.
fn last_error() -> String {
    // SAFETY: the function takes nothing and returns text of this thread, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return String::from("the loader gives no reason");
    }
    // SAFETY: the text ends with a zero byte and stays until the thread's next call of the loader.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// A table of a library's functions: for each its name in Rust, its name in the library and its parameters' types. All
/// of them return what stands behind the table's name, which says whether that was a success.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident -> $status:ty { $($name:ident = $symbol:literal ($($kind:ty),* $(,)?);)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($kind),*) -> $status,)*
        }

        impl $table {
            /// The functions of a library that has them all.
            pub(super) fn of(library: &$crate::cuda::sys::library::Library) -> $crate::cuda::error::Result<Self> {
                $(
                    let $name = library.need($symbol)?;
                    // SAFETY: a function of this name has this type in every library that NVIDIA makes, and the library
                    // is never unloaded.
                    let $name = unsafe {
                        std::mem::transmute::<
                            *mut std::ffi::c_void,
                            unsafe extern "C" fn($($kind),*) -> $status,
                        >($name)
                    };
                )*
                Ok(Self { $($name),* })
            }
        }
    };
}
pub(super) use functions;

//! The extension module `zeroxide._core`: conversion between Python and the offload layer, and error mapping.

mod bringer;
mod errors;
mod groups;
mod offload;
mod process;
mod spec;
mod window;
mod words;

use pyo3::prelude::*;

/// Rust core of zeroxide.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::bringer::PyBringer;
    #[pymodule_export]
    use crate::groups::check_groups;
    #[pymodule_export]
    use crate::offload::PyOffload;
    #[pymodule_export]
    use crate::process::{drop_clean_text, keep_freed_memory, reset_peak, resident};
    #[pymodule_export]
    use crate::spec::{TensorSpec, checksum};
    #[pymodule_export]
    use crate::window::PyWindow;

    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

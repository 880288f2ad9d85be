//! The extension module `zeroxide._core`: conversion between Python and the offload layer, and error mapping.

mod blocks;
mod bringer;
mod buffer;
mod codec;
mod commits;
mod cuda;
mod dlpack;
mod early_updates;
mod errors;
mod file_checksum;
mod file_queue;
mod gradient_hook;
mod offload;
mod optimizer;
mod plan;
mod probe;
mod process;
mod recorder;
mod report;
mod settings;
mod spec;
mod state;
mod window;
mod words;

use pyo3::prelude::*;

/// Rust core of zeroxide.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::blocks::{
        add_message, dequantise_message, expand_message, message_bytes, quantise_message,
        shrink_gradients,
    };
    #[pymodule_export]
    use crate::bringer::PyBringer;
    #[pymodule_export]
    use crate::codec::{decode_weights, encode_weights, round_bf16};
    #[pymodule_export]
    use crate::commits::{PyCommits, PyCommittedReads};
    #[pymodule_export]
    use crate::cuda::{
        CudaContext, CudaKernel, CudaProbe, KeptCubin, Nvrtc, PinnedMemory, kernel_headers,
        kernel_source, probe_cuda, probe_storage, read_cubin,
    };
    #[pymodule_export]
    use crate::early_updates::EarlyUpdates;
    #[pymodule_export]
    use crate::file_checksum::FileChecksum;
    #[pymodule_export]
    use crate::file_queue::FileQueue;
    #[pymodule_export]
    use crate::gradient_hook::GradientHook;
    #[pymodule_export]
    use crate::offload::PyOffload;
    #[pymodule_export]
    use crate::optimizer::{Rule, formats, state_tensors};
    #[pymodule_export]
    use crate::plan::{PyDeviceRequest, PyPlan};
    #[pymodule_export]
    use crate::probe::{PyDiskSpeed, instruction_set, measure};
    #[pymodule_export]
    use crate::process::{
        drop_clean_text, drop_pages_of_files, heap_bytes, keep_freed_memory, reset_peak, resident,
    };
    #[pymodule_export]
    use crate::recorder::PyRecorder;
    #[pymodule_export]
    use crate::settings::{
        PyGradientHome, PyIoEngine, PyMeshPosition, PyQuantisation, PySettings, PyStateHome,
        PyTransport, PyUnitSpec, PyWeightHome,
    };
    #[pymodule_export]
    use crate::spec::{TensorSpec, checksum};
    #[pymodule_export]
    use crate::state::{read_moment, update_state, write_moment};
    #[pymodule_export]
    use crate::window::PyWindow;

    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("FRAME", zeroxide_layout::FRAME)?;
        module.add(
            "DEFAULT_TILE_ELEMENTS",
            zeroxide_plan::DEFAULT_TILE_ELEMENTS,
        )?;
        module.add(
            "DEFAULT_STAGING_BYTES",
            zeroxide_plan::DEFAULT_STAGING_BYTES,
        )?;
        module.add("ACTIVITIES", crate::recorder::activities())?;
        module.add("CUDA_DRIVER", zeroxide_device::cuda::DRIVER)?;
        module.add("NVRTC_OPTIONS", zeroxide_device::cuda::OPTIONS)?;
        crate::optimizer::add_rules(module)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

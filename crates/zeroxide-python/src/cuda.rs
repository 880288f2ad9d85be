//! CUDA's driver and compiler: what there is, kernels and their launch, and host memory that a device copies by itself.
//!
//! `unsafe` is at home here: what `buffer::fill` is promised, and passing on what `zeroxide.kernels` promises of a launch.

use std::ffi::c_int;
use std::path::PathBuf;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use zeroxide_device::cuda::{
    self, Compiler, Context, CudaError, DRIVER, Grid, Kept, Kernel, Probe, Source, Version,
};
use zeroxide_device::{Device, Registration};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_offload::Facts;

use crate::buffer;
use crate::errors::to_python;

fn failed<E: Facts + std::fmt::Display>(py: Python<'_>) -> impl Fn(E) -> PyErr {
    move |error| to_python(py, &error)
}

fn pair(version: Version) -> (u32, u32) {
    (version.major, version.minor)
}

/// What a machine has of CUDA.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct CudaProbe {
    /// The CUDA version that the driver is for; None where there is no driver that does, or no device.
    #[pyo3(get)]
    version: Option<(u32, u32)>,
    /// Devices that the driver shows.
    #[pyo3(get)]
    devices: u32,
    /// Why there is none, in one line.
    #[pyo3(get)]
    problem: Option<String>,
}

/// Looks for a driver and devices; that there are none is an answer.
#[pyfunction]
#[pyo3(signature = (library = DRIVER))]
pub(crate) fn probe_cuda(py: Python<'_>, library: &str) -> CudaProbe {
    match py.detach(|| cuda::probe(library)) {
        Probe::Usable { version, devices } => CudaProbe {
            version: Some(pair(version)),
            devices,
            problem: None,
        },
        Probe::Unusable(error) => CudaProbe {
            version: None,
            devices: 0,
            problem: Some(error.to_string()),
        },
    }
}

/// Looks whether devices can read files in `directory` without host memory in between; an error says what is missing.
/// The library may log to the current directory and may take long: a process of its own should ask.
#[pyfunction]
#[pyo3(signature = (libraries, directory, *, driver = DRIVER))]
#[expect(clippy::needless_pass_by_value, reason = "PyO3 makes path and names")]
pub(crate) fn probe_storage(
    py: Python<'_>,
    libraries: Vec<String>,
    directory: PathBuf,
    driver: &str,
) -> PyResult<()> {
    py.detach(|| cuda::probe_storage(driver, &libraries, &directory))
        .map_err(failed(py))
}

/// The text of a kernel's source by its name without `.cu`; None where there is none of that name.
#[pyfunction]
pub(crate) fn kernel_source(name: &str) -> Option<String> {
    cuda::source(name).map(|source| source.text)
}

/// Name and text of what the kernels' sources include.
#[pyfunction]
pub(crate) fn kernel_headers() -> Vec<(&'static str, &'static str)> {
    cuda::headers().to_vec()
}

/// The run-time compiler.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct Nvrtc {
    compiler: Compiler,
}

/// Machine code that came out of a file or from the compiler.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct KeptCubin {
    kept: Kept,
}

#[pymethods]
impl KeptCubin {
    /// The file of machine code.
    #[getter]
    fn cubin<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.kept.cubin().bytes())
    }

    /// What the compiler said when it made the code.
    #[getter]
    fn log(&self) -> &str {
        self.kept.log()
    }

    /// The version of the compiler that made it.
    #[getter]
    fn compiler(&self) -> (u32, u32) {
        pair(self.kept.compiler)
    }

    /// Whether a file had the code.
    #[getter]
    fn cached(&self) -> bool {
        self.kept.cached
    }

    /// Why the code could not be kept in the cache, in one line.
    #[getter]
    fn problem(&self) -> Option<String> {
        self.kept.problem.as_ref().map(ToString::to_string)
    }

    /// The code, and all that it was made of, as `read_cubin` takes it.
    fn file<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.kept.file())
    }
}

/// Options, or those that kernels are compiled with.
fn options_or_usual(options: Option<Vec<String>>) -> Vec<String> {
    options.unwrap_or_else(|| cuda::OPTIONS.map(String::from).to_vec())
}

/// Machine code in a file, if it was made of `text` for that architecture; None where there is none, or of something
/// else.
#[pyfunction]
#[pyo3(signature = (path, name, text, headers, *, architecture, options = None))]
#[expect(clippy::needless_pass_by_value, reason = "PyO3 makes the path")]
pub(crate) fn read_cubin(
    py: Python<'_>,
    path: PathBuf,
    name: String,
    text: String,
    headers: Vec<(String, String)>,
    architecture: u32,
    options: Option<Vec<String>>,
) -> PyResult<Option<KeptCubin>> {
    let options = options_or_usual(options);
    let source = Source {
        name,
        text,
        headers,
    };
    let found = py
        .detach(|| cuda::read_cubin(&path, &source, architecture, &options))
        .map_err(failed(py))?;
    Ok(found.map(|kept| KeptCubin { kept }))
}

#[pymethods]
impl Nvrtc {
    /// The first of `libraries`, paths or names, that can be loaded.
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "PyO3 makes the list")]
    fn new(py: Python<'_>, libraries: Vec<String>) -> PyResult<Self> {
        let compiler = py
            .detach(|| Compiler::open(&libraries))
            .map_err(failed(py))?;
        Ok(Self { compiler })
    }

    /// Its version.
    #[getter]
    fn version(&self) -> (u32, u32) {
        pair(self.compiler.version())
    }

    /// Where it was loaded from.
    #[getter]
    fn library(&self) -> &str {
        self.compiler.library()
    }

    /// Compute capabilities that it compiles for, as 90 for 9.0.
    #[getter]
    fn architectures(&self) -> Vec<u32> {
        self.compiler.architectures().to_vec()
    }

    /// Machine code of `text` for an architecture, out of the directory `cache` where it is there and whole.
    #[pyo3(signature = (name, text, headers, *, architecture, cache, options = None))]
    #[expect(clippy::too_many_arguments, reason = "Python passes them by name")]
    fn compile(
        &self,
        py: Python<'_>,
        name: String,
        text: String,
        headers: Vec<(String, String)>,
        architecture: u32,
        cache: PathBuf,
        options: Option<Vec<String>>,
    ) -> PyResult<KeptCubin> {
        let options = options_or_usual(options);
        let source = Source {
            name,
            text,
            headers,
        };
        let kept = py
            .detach(|| {
                cuda::Cache::new(cache).compile(&self.compiler, &source, architecture, &options)
            })
            .map_err(failed(py))?;
        Ok(KeptCubin { kept })
    }
}

/// This process's part in a device's primary context, which torch uses as well.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct CudaContext {
    context: Context,
}

#[pymethods]
impl CudaContext {
    #[new]
    #[pyo3(signature = (device, library = DRIVER))]
    fn new(py: Python<'_>, device: u32, library: &str) -> PyResult<Self> {
        let context = py
            .detach(|| Context::open(library, device))
            .map_err(failed(py))?;
        Ok(Self { context })
    }

    /// The device's number, from 0.
    #[getter]
    fn device(&self) -> u32 {
        self.context.device()
    }

    /// What the maker calls it.
    #[getter]
    fn name(&self) -> &str {
        self.context.name()
    }

    /// Its compute capability, as 90 for 9.0.
    #[getter]
    fn architecture(&self) -> u32 {
        self.context.architecture()
    }

    /// Its multiprocessors.
    #[getter]
    fn multiprocessors(&self) -> u32 {
        self.context.multiprocessors()
    }

    /// The CUDA version that the driver is for.
    #[getter]
    fn driver_version(&self) -> (u32, u32) {
        pair(self.context.driver_version())
    }

    /// Free bytes of the device and all of them.
    fn memory(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        py.detach(|| self.context.memory()).map_err(failed(py))
    }

    /// Loads the kernel `entry` of what a compiler made of `source_name`.
    fn load(
        &self,
        py: Python<'_>,
        source_name: &str,
        kept: &KeptCubin,
        entry: &str,
    ) -> PyResult<CudaKernel> {
        let loaded = py.detach(|| {
            self.context.check_compiler(kept.kept.compiler)?;
            self.context.load(source_name, kept.kept.cubin(), entry)
        });
        Ok(CudaKernel {
            kernel: loaded.map_err(failed::<CudaError>(py))?,
        })
    }

    /// New host memory of `nbytes`, registered with the device where `registered` says so.
    #[pyo3(signature = (nbytes, registered = true))]
    fn host_memory(
        &self,
        py: Python<'_>,
        nbytes: usize,
        registered: bool,
    ) -> PyResult<PinnedMemory> {
        py.detach(|| PinnedMemory::new(&self.context, nbytes, registered))
            .map_err(failed(py))
    }
}

/// A kernel that is loaded.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct CudaKernel {
    kernel: Kernel,
}

#[pymethods]
impl CudaKernel {
    /// Registers of a thread, its bytes of local memory, and the bytes of the kernel's argument or None.
    fn usage(&self, py: Python<'_>) -> PyResult<(u32, u32, Option<u64>)> {
        let found = self.kernel.usage().map_err(failed(py))?;
        Ok((found.registers, found.local_bytes, found.argument_bytes))
    }

    /// Starts the kernel on a stream, by its handle, and returns before it ends. `args` is its one argument.
    ///
    /// Whoever calls it promises that the addresses in `args` are those of memory that the kernel may use until it ends.
    fn launch(
        &self,
        py: Python<'_>,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        stream: usize,
        args: &[u8],
    ) -> PyResult<()> {
        let grid = Grid {
            blocks,
            threads,
            shared_bytes,
        };
        // SAFETY: the wrappers in `zeroxide.kernels` check the tensors whose addresses they pass, and torch keeps their
        // memory for what comes later in the stream; the stream is torch's current one.
        py.detach(|| unsafe { self.kernel.launch(grid, stream, args) })
            .map_err(failed(py))
    }
}

/// Host memory that a device copies from and to by itself, as a Python buffer.
#[pyclass(frozen, module = "zeroxide._core")]
pub(crate) struct PinnedMemory {
    // Dropped in this order: the registration ends before the memory goes.
    _registration: Registration,
    address: usize,
    nbytes: usize,
    _lease: Lease,
}

impl PinnedMemory {
    fn new(
        context: &Context,
        nbytes: usize,
        registered: bool,
    ) -> Result<Self, zeroxide_device::DeviceError> {
        let arena = Arena::new(&Budget::new(None), Bucket::Staging, nbytes)?;
        let lease = arena.lease(nbytes, 4096)?;
        let registration = if registered {
            context.register(&lease)?
        } else {
            Registration::nothing()
        };
        Ok(Self {
            _registration: registration,
            address: lease.as_ptr().expose_provenance(),
            nbytes,
            _lease: lease,
        })
    }
}

#[pymethods]
impl PinnedMemory {
    /// First address.
    #[getter]
    fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    #[expect(clippy::needless_pass_by_value, reason = "the signature is PyO3's")]
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: Python passes the view; this object holds the lease, and nobody else reads or writes its bytes.
        unsafe { buffer::fill(slf.as_any(), view, this.address, this.nbytes, flags) }
    }
}

//! What an error carries, by name: for callers that act on the numbers of an error instead of on its text.
//!
//! Every variant is listed here with every field, so that a new one does not compile before it is passed on.

use zeroxide_device::DeviceError;
use zeroxide_device::cuda::CudaError;
use zeroxide_exchange::ExchangeError;
use zeroxide_layout::LayoutError;
use zeroxide_memory::MemoryError;
use zeroxide_optim::OptimError;
use zeroxide_storage::StorageError;

use crate::error::OffloadError;

/// Whose matter an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// A byte budget that the user gave.
    Budget,
    /// A file, a directory or a disk.
    Storage,
    /// Other ranks.
    Ranks,
    /// A compute device, its driver or its compiler.
    Device,
    /// The model, or how a script uses it.
    Model,
    /// A value outside of what is allowed.
    Value,
    /// A call that the present state does not allow, or a broken invariant.
    Core,
}

/// One value that an error carries.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// Bytes, elements, numbers of things, addresses, checksums, codes of the operating system.
    Count(u64),
    /// A number with a fraction.
    Number(f64),
    /// Text and paths.
    Text(String),
    /// Several numbers of things.
    Counts(Vec<u64>),
}

impl From<u64> for Fact {
    fn from(value: u64) -> Self {
        Self::Count(value)
    }
}

impl From<u32> for Fact {
    fn from(value: u32) -> Self {
        Self::Count(value.into())
    }
}

impl From<usize> for Fact {
    fn from(value: usize) -> Self {
        Self::Count(value as u64)
    }
}

impl From<f64> for Fact {
    fn from(value: f64) -> Self {
        Self::Number(value)
    }
}

/// The name of a value and the value.
pub type Named = (&'static str, Fact);

/// An error whose values can be asked for by name.
pub trait Facts {
    /// Whose matter it is.
    fn concern(&self) -> Concern;

    /// Every field of the variant under its own name. The operating system's reason, where there is one, is `errno` (its
    /// code, if it has one) and `reason` (its text).
    fn facts(&self) -> Vec<Named>;
}

/// The facts of an enum: first the variants that pass an error of another crate through, then each of its own with all
/// its fields, and for each field the function that notes it.
macro_rules! facts_of {
    ($error:expr, $kind:ident: $([$inner:ident])* $($variant:ident { $($field:ident: $note:ident),* })*) => {
        match $error {
            $($kind::$inner(error) => error.facts(),)*
            $($kind::$variant { $($field),* } => {
                #[allow(unused_mut, reason = "some variants have no fields")]
                let mut found = Vec::new();
                $(note::$note(&mut found, stringify!($field), $field);)*
                found
            })*
        }
    };
}

/// How fields are noted.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "fields come as patterns bind them"
)]
mod note {
    use std::fmt::Display;
    use std::io;
    use std::path::Path;

    use zeroxide_memory::Bucket;
    use zeroxide_storage::Holder;

    use super::{Fact, Named};

    /// The code with which the operating system says that a disk is full.
    const ENOSPC: u32 = 28;

    pub(super) fn number<T: Copy + Into<Fact>>(
        found: &mut Vec<Named>,
        name: &'static str,
        value: &T,
    ) {
        found.push((name, (*value).into()));
    }

    pub(super) fn text(found: &mut Vec<Named>, name: &'static str, value: &impl Display) {
        found.push((name, Fact::Text(value.to_string())));
    }

    pub(super) fn numbers(found: &mut Vec<Named>, name: &'static str, values: &[u32]) {
        let values = values.iter().copied().map(u64::from).collect();
        found.push((name, Fact::Counts(values)));
    }

    pub(super) fn path(found: &mut Vec<Named>, name: &'static str, value: &Path) {
        text(found, name, &value.display());
    }

    pub(super) fn bucket(found: &mut Vec<Named>, name: &'static str, value: &Bucket) {
        text(found, name, &value.name());
    }

    /// What the operating system said.
    pub(super) fn system(found: &mut Vec<Named>, _: &'static str, value: &io::Error) {
        if let Some(code) = value.raw_os_error() {
            number(found, "errno", &code.unsigned_abs());
        }
        text(found, "reason", value);
    }

    pub(super) fn reason(found: &mut Vec<Named>, _: &'static str, value: &impl Display) {
        text(found, "reason", value);
    }

    pub(super) fn holder(found: &mut Vec<Named>, name: &'static str, value: &Holder) {
        text(found, name, value);
        match value {
            Holder::Run { pid } | Holder::Orphan { pid } => number(found, "pid", pid),
            Holder::Unknown => {}
        }
    }

    /// The free bytes of a full disk, with the code by which the operating system names that.
    pub(super) fn full(found: &mut Vec<Named>, name: &'static str, value: &u64) {
        number(found, name, value);
        number(found, "errno", &ENOSPC);
    }

    /// A unit's name, also where models have names.
    pub(super) fn model(found: &mut Vec<Named>, name: &'static str, value: &String) {
        text(found, name, value);
        text(found, "name", value);
    }

    /// The bytes that a pool has, which are also the limit of its bucket.
    pub(super) fn frames(found: &mut Vec<Named>, name: &'static str, value: &u64) {
        number(found, name, value);
        number(found, "limit", value);
        bucket(found, "bucket", &Bucket::Gathered);
    }
}

impl Facts for OffloadError {
    fn concern(&self) -> Concern {
        match self {
            Self::Storage(error) => error.concern(),
            Self::Memory(error) => error.concern(),
            Self::Optim(error) => error.concern(),
            Self::Exchange(error) => error.concern(),
            Self::Layout(error) => error.concern(),
            Self::NoFrames { .. } => Concern::Budget,
            Self::Poisoned { .. } => Concern::Storage,
            Self::PoisonedAway { .. } => Concern::Device,
            Self::Stray { .. }
            | Self::Strayed { .. }
            | Self::NotFinite { .. }
            | Self::UpdatedEarly { .. }
            | Self::InsideStep { .. }
            | Self::OtherConstants => Concern::Model,
            Self::Misuse { .. } => Concern::Core,
        }
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, OffloadError: [Storage] [Memory] [Optim] [Exchange] [Layout]
            NoFrames { unit: text, need: number, held: number, capacity: frames }
            Poisoned { step: number, cause: text }
            PoisonedAway { step: number, cause: text }
            Stray { unit: model, cause: text }
            Strayed { line: text }
            NotFinite { unit: model, updated: number }
            UpdatedEarly { call: text, unit: model }
            InsideStep { call: text }
            OtherConstants {}
            Misuse { call: text, what: text })
    }
}

impl Facts for ExchangeError {
    fn concern(&self) -> Concern {
        match self {
            Self::Memory(error) => error.concern(),
            Self::Stopped { .. } => Concern::Ranks,
            Self::Misuse { .. } => Concern::Core,
        }
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, ExchangeError: [Memory]
            Stopped { line: text, ranks: numbers }
            Misuse { call: text, what: text })
    }
}

impl Facts for LayoutError {
    fn concern(&self) -> Concern {
        Concern::Value
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, LayoutError:
            UnknownDtype { text: text }
            UnknownFormat { text: text }
            Unsupported { format: text, dtype: text }
            Initial { format: text, name: text }
            TooLarge { what: text }
            EmptyWorld {}
            TileQuantum { what: text, got: number, quantum: number }
            NoSuchElement { param: number, element: number, params: number, numel: number }
            Frozen { param: number })
    }
}

impl Facts for OptimError {
    fn concern(&self) -> Concern {
        match self {
            Self::Hyperparameter { .. } => Concern::Value,
            Self::Threads { .. } => Concern::Core,
        }
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, OptimError:
            Hyperparameter { name: text, value: number, expected: text }
            Threads { threads: number, source: reason })
    }
}

impl Facts for MemoryError {
    fn concern(&self) -> Concern {
        match self {
            Self::OverBudget { .. } => Concern::Budget,
            Self::Exhausted { .. }
            | Self::InvalidRequest { .. }
            | Self::OutOfRange { .. }
            | Self::RangeBusy { .. }
            | Self::LeasesAlive { .. }
            | Self::WrongState { .. }
            | Self::FrameCount { .. }
            | Self::Forked { .. }
            | Self::Os { .. } => Concern::Core,
        }
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, MemoryError:
            OverBudget { bucket: bucket, need: number, used: number, limit: number }
            Exhausted { need: number, align: number, free: number, largest: number }
            InvalidRequest { what: text, got: number, expected: text }
            OutOfRange { start: number, end: number, len: number }
            RangeBusy { start: number, end: number }
            LeasesAlive { operation: text, bytes: number }
            WrongState { operation: text, state: text, expected: text }
            FrameCount { need: number, got: number }
            Forked { created: number, current: number }
            Os { call: text, bytes: number, source: system })
    }
}

impl Facts for StorageError {
    fn concern(&self) -> Concern {
        Concern::Storage
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, StorageError:
            NotADirectory { path: path }
            MissingParent { path: path, missing: path }
            ReadOnly { path: path, source: system }
            NoSpace { path: path, need: number, free: full }
            InUse { path: path, holder: holder }
            Foreign { path: path }
            DuplicateDirectory { path: path }
            Shares { expected: number, got: number }
            JobName { job: text, reason: text }
            Layout { block: text, reason: text }
            File { action: text, path: path, source: system }
            Io { op: text, path: path, offset: number, length: number, done: number, source: system }
            ShortTransfer { op: text, path: path, offset: number, expected: number, got: number }
            OutOfRange { op: text, path: path, offset: number, length: number, bytes: number }
            Misaligned { op: text, path: path, offset: number, length: number, address: number, align: number }
            Corrupt { path: path, block: text, tile: number, offset: number, expected: number, got: number }
            NeverWritten { path: path, block: text, tile: number }
            UnknownTile { block: text, tile: number, tiles: number }
            TileLength { block: text, tile: number, expected: number, got: number }
            Header { path: path, reason: text }
            OtherRun { path: path, difference: text }
            DataGone { path: path, reason: text }
            Commit { call: text, path: path, reason: text }
            Closed {}
            Forked { created: number, current: number }
            IoUringRefused { reason: text }
            Depth { depth: number, max: number }
            Engine { source: system })
    }
}

impl Facts for DeviceError {
    fn concern(&self) -> Concern {
        match self {
            Self::Memory(error) => error.concern(),
            Self::Cuda(error) => error.concern(),
            Self::OutOfRange { .. } => Concern::Core,
        }
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, DeviceError: [Memory] [Cuda]
            OutOfRange { at: number, count: number, size: number })
    }
}

impl Facts for CudaError {
    fn concern(&self) -> Concern {
        Concern::Device
    }

    fn facts(&self) -> Vec<Named> {
        facts_of!(self, CudaError:
            NoDriver { library: text, reason: text }
            DriverTooOld { library: text, found: text, need: text }
            NoEntry { library: text, entry: text }
            NoDevice { device: number, devices: number }
            NoCompiler { tried: text, reason: text }
            UnknownArchitecture { source_name: text, architecture: number, known: text, nvrtc: text }
            Compile { source_name: text, architecture: number, nvrtc: text, log: text }
            Compiler { call: text, source_name: text, nvrtc: text, reason: text }
            ZeroByte { what: text, at: number }
            OutOfMemory { what: text, need: number, free: number, total: number, device: number }
            Register { bytes: number, limit: text, device: number, reason: text }
            Load { source_name: text, device: number, architecture: number, reason: text }
            NoKernel { source_name: text, entry: text }
            Arguments { entry: text, expected: number, got: number }
            Launch { entry: text, blocks: number, threads: number, shared_bytes: number, stream: number, device: number, reason: text }
            Handle { what: text, handle: number, device: number, reason: text }
            Lost { call: text, device: number, reason: text }
            Driver { call: text, device: number, code: number, reason: text }
            Forked { created: number, current: number }
            Cache { action: text, path: path, source: system }
            NoStorage { tried: text, reason: text }
            Storage { call: text, code: number, reason: text }
            NotDirect { path: path, source: system }
            Damaged { path: path, reason: text })
    }
}

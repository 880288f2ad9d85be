//! Every variant of every error passes on every field, as its `Debug` output has them.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;

use zeroxide_exchange::ExchangeError;
use zeroxide_layout::{BlockId, Dtype, Format, LayoutError, StateKey};
use zeroxide_memory::{Bucket, MemoryError, WindowState};
use zeroxide_offload::{Concern, Fact, Facts, OffloadError};
use zeroxide_optim::OptimError;
use zeroxide_storage::{Difference, Holder, OpKind, StorageError};

/// The variants of an error enum with fields of their own, as its source lists them.
fn variants(source: &str) -> BTreeSet<String> {
    let body = source
        .split("pub enum ")
        .find(|part| {
            part.split_whitespace()
                .next()
                .is_some_and(|name| name.ends_with("Error"))
        })
        .expect("an error enum");
    let end = body.find("\n}").expect("the end of the enum");
    body[..end]
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.starts_with(char::is_uppercase) && !line.contains('('))
        .map(|line| line.trim_end_matches(['{', ',', ' ']).to_owned())
        .collect()
}

/// (variant, names of its fields) of an error as `Debug` prints it.
fn printed(error: &impl Debug) -> (String, Vec<String>) {
    let text = format!("{error:#?}");
    let variant = text.split_whitespace().next().expect("a name").to_owned();
    let fields = text
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.starts_with(|first: char| first.is_lowercase()))
        .filter_map(|line| line.split(':').next().map(str::to_owned))
        .collect();
    (variant, fields)
}

/// Catches: a variant or a field that the conversion leaves out or calls by another name, numbers passed on as text.
fn check<E: Facts + Debug>(samples: &[E], source: &str) {
    let mut seen = BTreeSet::new();
    for error in samples {
        let (variant, fields) = printed(error);
        let facts = error.facts();
        let names: BTreeSet<&str> = facts.iter().map(|(name, _)| *name).collect();
        for field in &fields {
            let expected = if field == "source" { "reason" } else { field };
            assert!(
                names.contains(expected),
                "{variant}: {expected} is not in {names:?}"
            );
        }
        for (name, fact) in &facts {
            let value = match fact {
                Fact::Count(value) => value.to_string(),
                Fact::Number(value) => value.to_string(),
                Fact::Text(value) => {
                    assert!(value.parse::<f64>().is_err(), "{variant}: {name} is text");
                    value.clone()
                }
                Fact::Counts(values) => values.iter().map(u64::to_string).collect(),
            };
            assert!(!value.is_empty(), "{variant}: {name} is empty");
        }
        seen.insert(variant);
    }
    assert_eq!(seen, variants(source), "a sample of each variant");
}

const BLOCK: BlockId = BlockId {
    unit: 3,
    key: StateKey::new("exp_avg"),
};

fn path() -> PathBuf {
    PathBuf::from("/somewhere/blocks.bin")
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(5)
}

#[test]
fn storage_errors() {
    let op = OpKind::Read;
    let block = BLOCK;
    #[rustfmt::skip]
    let samples = [
        StorageError::NotADirectory { path: path() },
        StorageError::MissingParent { path: path(), missing: path() },
        StorageError::ReadOnly { path: path(), source: refused() },
        StorageError::NoSpace { path: path(), need: 2, free: 1 },
        StorageError::InUse { path: path(), holder: Holder::Run { pid: 7 } },
        StorageError::Foreign { path: path() },
        StorageError::DuplicateDirectory { path: path() },
        StorageError::JobName { job: "a/b".into(), reason: "it has a slash" },
        StorageError::Layout { block, reason: "twice".into() },
        StorageError::File { action: "open", path: path(), source: refused() },
        StorageError::Io { op, path: path(), offset: 1, length: 2, done: 3, source: refused() },
        StorageError::ShortTransfer { op, path: path(), offset: 1, expected: 3, got: 2 },
        StorageError::OutOfRange { op, path: path(), offset: 1, length: 2, bytes: 3 },
        StorageError::Misaligned { op, path: path(), offset: 1, length: 2, address: 3, align: 4 },
        StorageError::Corrupt { path: path(), block, tile: 1, offset: 2, expected: 3, got: 4 },
        StorageError::NeverWritten { path: path(), block, tile: 1 },
        StorageError::UnknownTile { block, tile: 2, tiles: 1 },
        StorageError::TileLength { block, tile: 1, expected: 2, got: 3 },
        StorageError::Header { path: path(), reason: "cut short".into() },
        StorageError::OtherRun {
            path: path(),
            difference: Box::new(Difference {
                what: "stage".into(),
                found: "1".into(),
                wanted: "3".into(),
            }),
        },
        StorageError::DataGone { path: path(), reason: "no file".into() },
        StorageError::Commit { call: "adopt", path: path(), reason: "twice" },
        StorageError::Closed,
        StorageError::Forked { created: 1, current: 2 },
        StorageError::IoUringRefused { reason: "seccomp".into() },
        StorageError::Depth { depth: 0, max: 1 },
        StorageError::Engine { source: refused() },
        StorageError::Shares { expected: 2, got: 1 },
    ];
    check(
        &samples,
        include_str!("../../zeroxide-storage/src/error.rs"),
    );
    let errno = ("errno", Fact::Count(5));
    assert!(samples[10].facts().contains(&errno), "the system's code");
    assert!(
        samples[3].facts().contains(&("errno", Fact::Count(28))),
        "ENOSPC"
    );
    assert!(
        samples[4].facts().contains(&("pid", Fact::Count(7))),
        "the holder"
    );
    assert_eq!(
        samples[14].facts()[2..],
        [
            ("tile", Fact::Count(1)),
            ("offset", Fact::Count(2)),
            ("expected", Fact::Count(3)),
            ("got", Fact::Count(4))
        ]
    );
}

#[test]
fn memory_errors() {
    #[rustfmt::skip]
    let samples = [
        MemoryError::OverBudget { bucket: Bucket::Staging, need: 1, used: 2, limit: 3 },
        MemoryError::Exhausted { need: 1, align: 2, free: 3, largest: 4 },
        MemoryError::InvalidRequest { what: "window", got: 1, expected: "more" },
        MemoryError::OutOfRange { start: 1, end: 2, len: 3 },
        MemoryError::RangeBusy { start: 1, end: 2 },
        MemoryError::LeasesAlive { operation: "unmap", bytes: 1 },
        MemoryError::WrongState { operation: "map", state: WindowState::Home, expected: "an empty one" },
        MemoryError::FrameCount { need: 1, got: 2 },
        MemoryError::Forked { created: 1, current: 2 },
        MemoryError::Os { call: "mmap", bytes: 1, source: refused() },
    ];
    check(&samples, include_str!("../../zeroxide-memory/src/error.rs"));
    let over = samples[0].facts();
    assert_eq!(over[0], ("bucket", Fact::Text("staging".into())));
    assert_eq!(
        over[1..],
        [
            ("need", Fact::Count(1)),
            ("used", Fact::Count(2)),
            ("limit", Fact::Count(3))
        ]
    );
}

#[test]
fn errors_of_layouts_and_kernels() {
    #[rustfmt::skip]
    let samples = [
        LayoutError::UnknownDtype { text: "int8".into() },
        LayoutError::UnknownFormat { text: "none".into() },
        LayoutError::Unsupported { format: Format::Split, dtype: Dtype::F16 },
        LayoutError::Initial { format: Format::Compact, name: StateKey::new("sum") },
        LayoutError::TooLarge { what: "unit" },
        LayoutError::EmptyWorld,
        LayoutError::TileQuantum { what: "tile", got: 1, quantum: 2 },
        LayoutError::NoSuchElement { param: 1, element: 2, params: 3, numel: 4 },
        LayoutError::Frozen { param: 1 },
    ];
    check(&samples, include_str!("../../zeroxide-layout/src/error.rs"));

    let again = || {
        rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build_global()
    };
    again().expect("the first one in this process");
    let samples = [
        OptimError::Hyperparameter {
            name: "lr",
            value: -1.5,
            expected: "0 or more",
        },
        OptimError::Threads {
            threads: 4,
            source: again().expect_err("there is one already"),
        },
    ];
    check(&samples, include_str!("../../zeroxide-optim/src/error.rs"));
    assert!(samples[0].facts().contains(&("value", Fact::Number(-1.5))));
}

#[test]
fn errors_between_ranks_and_tiers() {
    let samples = [
        ExchangeError::Stopped {
            line: "rank 1 is lost".into(),
            ranks: vec![1],
        },
        ExchangeError::Misuse {
            call: "take",
            what: "too early".into(),
        },
    ];
    check(
        &samples,
        include_str!("../../zeroxide-exchange/src/error.rs"),
    );

    #[rustfmt::skip]
    let samples = [
        OffloadError::NoFrames { unit: "a".into(), need: 1, held: 2, capacity: 3 },
        OffloadError::Poisoned { step: 1, cause: "a disk".into() },
        OffloadError::PoisonedAway { step: 1, cause: "a kernel".into() },
        OffloadError::Stray { unit: "a".into(), cause: "why".into() },
        OffloadError::Strayed { line: "so".into() },
        OffloadError::NotFinite { unit: "a".into(), updated: 2 },
        OffloadError::UpdatedEarly { call: "gather", unit: "a".into() },
        OffloadError::InsideStep { call: "clear_gradients" },
        OffloadError::OtherConstants,
        OffloadError::Misuse { call: "step", what: "too early".into() },
    ];
    check(&samples, include_str!("../src/error.rs"));
}

/// Catches: an error of another crate that passes through with nothing, or as somebody else's matter.
#[test]
fn errors_pass_through_with_all_they_carry() {
    let full = || StorageError::NoSpace {
        path: path(),
        need: 2,
        free: 1,
    };
    let over = || MemoryError::OverBudget {
        bucket: Bucket::Gradients,
        need: 1,
        used: 2,
        limit: 3,
    };
    let stopped = || ExchangeError::Stopped {
        line: "gone".into(),
        ranks: vec![2],
    };
    let unknown = || LayoutError::UnknownDtype {
        text: "int8".into(),
    };
    let wrong = || OptimError::Hyperparameter {
        name: "lr",
        value: 0.5,
        expected: "less",
    };
    let inner: [(OffloadError, Concern, Vec<_>); 6] = [
        (full().into(), Concern::Storage, full().facts()),
        (over().into(), Concern::Budget, over().facts()),
        (
            ExchangeError::Memory(over()).into(),
            Concern::Budget,
            over().facts(),
        ),
        (stopped().into(), Concern::Ranks, stopped().facts()),
        (unknown().into(), Concern::Value, unknown().facts()),
        (wrong().into(), Concern::Value, wrong().facts()),
    ];
    for (error, concern, facts) in inner {
        assert_eq!(error.concern(), concern, "{error}");
        assert_eq!(error.facts(), facts, "{error}");
        assert!(!facts.is_empty(), "{error}");
    }
}

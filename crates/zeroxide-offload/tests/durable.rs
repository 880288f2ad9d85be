//! Durable runs: going on from a commit has the bits of a run that never stopped, wherever its state is at home.

mod harness;

use harness::{
    Case, REFERENCE_STEPS, UNITS, hyperparameters, master, reference, sim, step, try_master,
};
use zeroxide_layout::Format;
use zeroxide_offload::{Offload, OffloadError, Result, StateHome, WeightHome};
use zeroxide_storage::{Fault, FaultRule, OpKind, StorageError, Trigger};

/// The numbers of updates, which are the caller's to note.
fn updates(offload: &Offload) -> Vec<(usize, usize, u64)> {
    let each = |(unit, params): (usize, &&[(u64, bool)])| {
        let count = |param| (unit, param, offload.updates(unit, param).expect("there"));
        (0..params.len()).map(count).collect::<Vec<_>>()
    };
    UNITS.iter().enumerate().flat_map(each).collect()
}

fn note_of(offload: &Offload) -> String {
    let words = updates(offload).into_iter().map(|it| it.2.to_string());
    words.collect::<Vec<_>>().join(" ")
}

fn commit(offload: &Offload) -> Result<u64> {
    let generation = offload.prepare_commit(&note_of(offload))?;
    offload.conclude_commit()?;
    Ok(generation)
}

/// Opens what a run left, goes on from its newest commit, and returns the number of that.
fn resume(case: &Case) -> (Offload, u64) {
    let offload = case.try_open().expect("it fits");
    let newest = *offload
        .found_commits()
        .expect("durable")
        .last()
        .expect("there is one");
    let commit = offload.adopt(newest).expect("there").expect("not none");
    // What a run begins with is filled before it is known that it goes on: none of it may stay.
    for (unit, params) in UNITS.iter().enumerate() {
        offload.fill_begin(unit, "weight").expect("begins");
        for (param, (numel, _)) in params.iter().enumerate() {
            let values = vec![0.25; usize::try_from(*numel).expect("small")];
            offload.fill_param(unit, param, 0, &values).expect("fits");
        }
        offload.fill_commit(unit).expect("room");
    }
    offload.roll_back().expect("all is there");
    let counts = commit
        .note
        .split(' ')
        .map(|word| word.parse().expect("a number"));
    for ((unit, param, _), count) in updates(&offload).into_iter().zip(counts) {
        offload.set_updates(unit, param, count).expect("there");
    }
    (offload, commit.generation)
}

fn cases() -> impl Iterator<Item = Case> {
    let homes = [
        (WeightHome::Disk, StateHome::Disk),
        (WeightHome::Host, StateHome::Disk),
        (WeightHome::Disk, StateHome::Host),
    ];
    homes.into_iter().flat_map(|(weights, state)| {
        [Format::Split, Format::Fp32]
            .into_iter()
            .flat_map(move |format| {
                [2048, 6144].into_iter().map(move |tile_elements| Case {
                    weights,
                    state,
                    format,
                    tile_elements,
                    durable: true,
                    ..Case::default()
                })
            })
    })
}

/// Catches: a mirror left out or copied to the wrong place, moments taken for unwritten ones, a window that still shows
/// what was rolled back.
#[test]
fn going_on_from_a_commit_has_the_bits_of_a_run_that_never_stopped() {
    let expected = reference();
    for case in cases() {
        let what = format!(
            "{:?} {:?} {:?} {}",
            case.weights, case.state, case.format, case.tile_elements
        );
        let mut offload = case.open();
        for index in 0..REFERENCE_STEPS {
            step(&offload, index).expect("no fault was asked for");
            assert_eq!(commit(&offload).expect("room"), index + 1);
            // Something that is not of the commit, and is lost.
            step(&offload, 17).expect("no fault was asked for");
            drop(offload);
            let (resumed, generation) = resume(&case);
            assert_eq!(generation, index + 1, "{what}");
            offload = resumed;
        }
        assert_eq!(master(&offload), expected, "{what}");
    }
}

/// Catches: moments that no step has written yet, but were committed, taken for zeros that were written.
#[test]
fn a_commit_before_the_first_step_is_one() {
    for case in cases() {
        let offload = case.open();
        commit(&offload).expect("room");
        drop(offload);
        let (offload, _) = resume(&case);
        for index in 0..REFERENCE_STEPS {
            step(&offload, index).expect("no fault was asked for");
        }
        assert_eq!(master(&offload), reference());
    }
}

/// Catches: a reader that sees what training has made since, or that misses edits and frozen bytes.
#[test]
fn a_reader_has_the_commit_while_training_goes_on() {
    for case in cases() {
        let offload = case.open();
        step(&offload, 0).expect("no fault was asked for");
        commit(&offload).expect("room");
        let (weights, moments) = (master(&offload), values(&offload, "exp_avg"));
        let reads = offload.committed_reads().expect("there is a commit");
        step(&offload, 1).expect("no fault was asked for");
        offload.finish().expect("no fault was asked for");
        assert_ne!(master(&offload), weights);
        for (name, expected) in [("weight", &weights), ("exp_avg", &moments)] {
            let found = collect(|unit, param, out| reads.read_param(unit, param, name, 0, out));
            assert_eq!(
                &found, expected,
                "{name} {:?} {:?}",
                case.weights, case.state
            );
        }
        let frozen = u32::from_ne_bytes(frozen_bytes(|start, out| {
            reads.read_bytes(0, 2, start, out)
        }));
        let live = u32::from_ne_bytes(frozen_bytes(|start, out| {
            offload.read_bytes(0, 2, start, out)
        }));
        assert_eq!(frozen, live);
        let error = offload
            .prepare_commit("")
            .expect_err("it is being read")
            .to_string();
        assert!(error.contains("being read"), "{error}");
        drop(reads);
        commit(&offload).expect("room");
    }
}

/// Bytes 3 to 7 of a parameter, which begin and end inside of words.
fn frozen_bytes(read: impl Fn(u64, &mut [u8]) -> Result<()>) -> [u8; 4] {
    let mut out = [0; 4];
    read(3, &mut out).expect("there");
    out
}

fn values(offload: &Offload, name: &str) -> Vec<u32> {
    collect(|unit, param, out| offload.read_param(unit, param, name, 0, out))
}

fn collect(read: impl Fn(usize, usize, &mut [f32]) -> Result<()>) -> Vec<u32> {
    let mut all = Vec::new();
    for (unit, params) in UNITS.iter().enumerate() {
        for (param, (numel, _)) in params.iter().enumerate() {
            let mut out = vec![0.0; usize::try_from(*numel).expect("small")];
            read(unit, param, &mut out).expect("there");
            all.extend(out.iter().map(|value| value.to_bits()));
        }
    }
    all
}

/// Catches: a commit after a write that failed, whose tile would then be named by it.
#[test]
fn after_a_failed_write_nothing_is_committed() {
    let faults = |from| {
        sim(move |options| {
            options.faults = vec![FaultRule {
                kind: Some(OpKind::Write),
                when: Trigger::From(from),
                fault: Fault::Errno(5),
            }];
        })
    };
    let mut struck = 0;
    for from in (0..160).step_by(9) {
        let mut case = Case {
            weights: WeightHome::Host,
            durable: true,
            ..Case::default()
        };
        commit(&case.open()).expect("room");
        case.engine = faults(from);
        let offload = case.try_open().expect("it fits");
        offload.adopt(1).expect("there");
        offload.roll_back().expect("nothing is written");
        let outcome = step(&offload, 0)
            .and_then(|()| offload.finish())
            .and_then(|()| commit(&offload));
        if outcome.is_ok() {
            continue;
        }
        struck += 1;
        assert!(commit(&offload).is_err(), "from {from}");
        drop(offload);
        case.engine = sim(|_| {});
        let (offload, generation) = resume(&case);
        assert_eq!(generation, 1);
        assert_eq!(master(&offload), master(&Case::default().open()));
    }
    assert!(struck > 5, "{struck} commits failed");
}

/// Catches: a run that promises to survive and cannot.
#[test]
fn what_no_commit_reaches_is_refused() {
    let case = Case {
        weights: WeightHome::Host,
        state: StateHome::Host,
        durable: true,
        ..Case::default()
    };
    let error = case
        .try_open()
        .err()
        .expect("nothing is on disk")
        .to_string();
    assert!(error.contains("nothing at home on disk"), "{error}");
    let offload = Case::default().open();
    let error = commit(&offload).expect_err("not durable").to_string();
    assert!(error.contains("not durable"), "{error}");
    assert!(offload.roll_back().is_err() && offload.committed_reads().is_err());
}

/// Catches: a flipped bit of a mirror that passes for the weight.
#[test]
fn a_damaged_mirror_is_named_and_nothing_goes_on() {
    let case = Case {
        weights: WeightHome::Host,
        durable: true,
        ..Case::default()
    };
    commit(&case.open()).expect("room");
    let path = case.directory.path().join("test/blocks.bin");
    let mut bytes = std::fs::read(&path).expect("there");
    for byte in bytes.iter_mut().step_by(4096) {
        *byte ^= 1;
    }
    std::fs::write(&path, bytes).expect("writable");
    let offload = case.try_open().expect("it fits");
    offload.adopt(1).expect("there");
    let error = offload.roll_back().expect_err("damaged");
    assert!(
        matches!(error, OffloadError::Storage(StorageError::Corrupt { .. })),
        "{error}"
    );
    let error = try_master(&offload).expect_err("a mixture").to_string();
    assert!(error.contains("mixed"), "{error}");
    assert!(offload.step(&[hyperparameters()], 1.0).is_err());
}

//! The streaming step over every tier, against one plain pass of the kernel over the whole state.

mod harness;

use harness::rounded::{PARTS, all_values, rounded, whole};
use harness::{Case, REFERENCE_STEPS, UNITS, master, reference, run, sim};
use zeroxide_layout::Format;
use zeroxide_offload::{OffloadError, StateHome, WeightHome};
use zeroxide_storage::{EngineKind, Fault, FaultRule, OpKind, StorageError, Trigger};

const EINTR: i32 = 4;
const EIO: i32 = 5;

/// Catches: a tile skipped or updated twice, a segment cut wrongly at a tile or part boundary, a read that overtakes a
/// write, frames given away too early.
#[test]
fn every_home_format_and_thread_count_gives_the_bits_of_one_plain_pass() {
    let expected = reference();
    for weights in [WeightHome::Host, WeightHome::Disk] {
        for state in [StateHome::Host, StateHome::Disk] {
            for format in [Format::Split, Format::Fp32] {
                for threads in [1, 2, 3] {
                    for tile_elements in [2048, 6144, 1 << 20] {
                        let case = Case {
                            weights,
                            state,
                            format,
                            threads,
                            tile_elements,
                            ..Case::default()
                        };
                        let offload = run(&case, REFERENCE_STEPS).expect("no fault was asked for");
                        assert_eq!(
                            master(&offload),
                            expected,
                            "{weights:?} {state:?} {format:?} {threads} {tile_elements}"
                        );
                    }
                }
            }
        }
    }
}

/// Every value of the trained parameters, where the state is and however it is cut, beside one kernel call a parameter and
/// step. The reference keeps whole parameters in one piece and knows nothing of units, tiles, parts or homes.
///
/// Catches: random bits that begin anew at a tile or a thread's part, or that two parameters of a run share; a page of a
/// narrow tensor that is left out of a checksum; a block of moments at the place of another.
#[test]
fn formats_that_round_give_the_bits_of_one_plain_pass_everywhere() {
    for format in [Format::SplitBf16, Format::Compact] {
        let expected = rounded(format);
        for weights in [WeightHome::Host, WeightHome::Disk] {
            for state in [StateHome::Host, StateHome::Disk] {
                for threads in [1, 2, 3] {
                    for tile_elements in [2048, 6144, 1 << 20] {
                        let case = Case {
                            weights,
                            state,
                            format,
                            threads,
                            tile_elements,
                            ..Case::default()
                        };
                        let offload = run(&case, REFERENCE_STEPS).expect("no fault was asked for");
                        assert!(
                            all_values(&offload) == expected,
                            "{weights:?} {state:?} {format:?} {threads} {tile_elements}"
                        );
                    }
                }
            }
        }
    }
}

/// Values read come back to the bits that they were read from, in parts and after a detour over another core; parts of a
/// block are read as they are, and refused where they are written.
///
/// Catches: a fill or an edit that puts a block into another tile, a read that starts at the beginning of a block though
/// less was asked for, a write that rounds the rest of a block again.
#[test]
fn blocks_are_read_in_parts_filled_and_edited() {
    for state in [StateHome::Host, StateHome::Disk] {
        let case = || Case {
            state,
            format: Format::Compact,
            ..Case::default()
        };
        let (first, other) = (case(), case());
        let offload = run(&first, REFERENCE_STEPS).expect("no fault was asked for");
        let expected = all_values(&offload);
        let again = other.open();
        for (unit, params) in UNITS.iter().enumerate() {
            for part in PARTS {
                again.fill_begin(unit, part).expect("a part");
                for (param, (numel, trainable)) in params.iter().enumerate() {
                    let values = whole(&offload, unit, param, part, *numel);
                    // In parts of 640 elements: ten blocks, which no tile is a multiple of.
                    for start in (0..values.len()).step_by(640).filter(|_| *trainable) {
                        let end = values.len().min(start + 640);
                        again
                            .fill_param(unit, param, start as u64, &values[start..end])
                            .expect("whole blocks");
                    }
                }
                again.fill_commit(unit).expect("the fill that has begun");
            }
        }
        assert!(all_values(&again) == expected, "filled, {state:?}");

        let moment = whole(&again, 1, 0, "exp_avg", 9000);
        let mut part = [0.0; 100];
        again
            .read_param(1, 0, "exp_avg", 2040, &mut part)
            .expect("read");
        let bits = |values: &[f32]| {
            values
                .iter()
                .map(|value| value.to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(bits(&part), bits(&moment[2040..2140]), "{state:?}");
        let error = again
            .write_param(1, 0, "exp_avg", 2040, &part)
            .expect_err("parts of blocks");
        assert!(error.to_string().contains("give whole blocks"), "{error}");
        again
            .write_param(1, 0, "exp_avg", 8960, &moment[8960..])
            .expect("up to the end");
        again
            .write_param(1, 0, "exp_avg", 2048, &vec![0.5; 128])
            .expect("whole blocks");
        let mut edited = moment.clone();
        edited[2048..2176].fill(0.5);
        let found = whole(&again, 1, 0, "exp_avg", 9000);
        for (at, (found, edited)) in found.iter().zip(&edited).enumerate() {
            let bound = if (2048..2176).contains(&at) {
                0.5 / 127.0
            } else {
                0.0
            };
            assert!(
                (found - edited).abs() <= bound,
                "{at}: {found} {edited} {state:?}"
            );
        }
    }
}

/// Catches: a core that rounds all parameters by the same bits since it was given none.
#[test]
fn a_format_that_rounds_needs_random_bits_for_each_parameter() {
    let case = Case {
        format: Format::Compact,
        streams: false,
        ..Case::default()
    };
    let Err(error) = case.try_open() else {
        panic!("it has no random bits");
    };
    let text = error.to_string();
    assert!(
        text.contains("unit 0 is compact") && text.contains("0 streams"),
        "{text}"
    );
}

/// Catches: a partial transfer taken for a whole one, completions expected in order.
#[test]
fn short_interrupted_and_reordered_transfers_change_nothing() {
    let expected = reference();
    for seed in 0..4 {
        let engine = sim(|options| {
            options.seed = seed;
            options.reorder = true;
            options.short_share = 0.5;
            options.faults = vec![FaultRule {
                kind: None,
                when: Trigger::Nth(7),
                fault: Fault::Errno(EINTR),
            }];
        });
        let case = Case {
            engine,
            tile_elements: 4096,
            ..Case::default()
        };
        let offload = run(&case, REFERENCE_STEPS).expect("all of these are retried");
        assert_eq!(master(&offload), expected);
    }
}

/// Catches: an error of one tile that does not reach the caller, a step that goes on after it, and a state that is used
/// although it is mixed.
#[test]
fn an_error_in_the_middle_of_a_step_is_named_and_poisons_the_state() {
    for kind in [OpKind::Read, OpKind::Write] {
        let engine = sim(|options| {
            options.faults = vec![FaultRule {
                kind: Some(kind),
                when: Trigger::From(60),
                fault: Fault::Errno(EIO),
            }];
        });
        // With the weights in memory, only the step reads.
        let case = Case {
            engine,
            weights: WeightHome::Host,
            ..Case::default()
        };
        let offload = case.open();
        let failure = (0..40)
            .find_map(|step| harness::step(&offload, step).err())
            .expect("the fault strikes");
        assert!(
            matches!(&failure, OffloadError::Storage(StorageError::Io { .. })),
            "{failure}"
        );
        let after = harness::step(&offload, 0).expect_err("the state is mixed");
        assert!(matches!(after, OffloadError::Poisoned { .. }), "{after}");
        assert!(after.to_string().contains("checkpoint"), "{after}");
        offload.close(&[]).expect("closing works after a failure");
    }
}

/// Catches: a completion that is taken after an error and not noted, which the end of the step then waits for for ever.
#[test]
fn several_writes_that_fail_together_end_the_step() {
    for from in 20..60 {
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let case = Case {
                engine: sim(|options| {
                    options.faults = vec![FaultRule {
                        kind: Some(OpKind::Write),
                        when: Trigger::From(from),
                        fault: Fault::Errno(EIO),
                    }];
                }),
                weights: WeightHome::Host,
                ..Case::default()
            };
            let offload = case.open();
            let gather_all = || {
                (0..harness::UNITS.len()).try_for_each(|unit| {
                    offload.gather(unit, false)?;
                    offload.release(unit)
                })
            };
            let failure = (0..40).find_map(|step| {
                let outcome = harness::step(&offload, step).and_then(|()| gather_all());
                // The last writes end before anybody looks.
                std::thread::sleep(std::time::Duration::from_millis(3));
                outcome.err()
            });
            // Nobody listens any more where this comes too late.
            let _ = ended.send(failure.is_some());
        });
        let found = end.recv_timeout(std::time::Duration::from_mins(1));
        assert_eq!(found, Ok(true), "writes fail from {from} on");
    }
}

/// Catches: a checksum not compared in the step, in the gather, or in a read for a checkpoint.
#[test]
fn a_bit_that_flips_on_the_disk_never_becomes_a_number() {
    for fault in [Fault::FlipBit, Fault::Torn(512)] {
        for nth in [3, 17, 31] {
            let engine = sim(|options| {
                options.faults = vec![FaultRule {
                    kind: Some(OpKind::Write),
                    when: Trigger::Nth(nth),
                    fault,
                }];
            });
            let case = Case {
                engine,
                ..Case::default()
            };
            let outcome = (|| {
                let offload = case.open_filled()?;
                for step in 0..REFERENCE_STEPS {
                    harness::step(&offload, step)?;
                }
                harness::try_master(&offload)
            })();
            match outcome {
                Err(OffloadError::Storage(StorageError::Corrupt { .. })) => {}
                Err(other) => panic!("{fault:?} at write {nth}: {other}"),
                // A tile may be overwritten before anybody reads it, or hold the same bytes.
                Ok(values) => assert_eq!(values, reference(), "{fault:?} at write {nth}"),
            }
        }
    }
}

/// Catches: scratch files that outlive the run.
#[test]
fn closing_removes_the_scratch_files() {
    let case = Case::default();
    let offload = run(&case, 1).expect("no fault was asked for");
    assert!(
        case.directory
            .path()
            .read_dir()
            .expect("exists")
            .next()
            .is_some()
    );
    offload.close(&[]).expect("nothing in the way");
    assert!(
        case.directory
            .path()
            .read_dir()
            .expect("exists")
            .next()
            .is_none()
    );
    assert!(matches!(
        offload.gather(0, false),
        Err(OffloadError::Misuse { .. })
    ));
}

/// Catches: a budget that is checked after memory was taken, a ring too small for one tile that hangs instead.
#[test]
fn too_little_memory_is_refused_with_the_numbers() {
    let case = Case {
        limit: Some(1 << 20),
        ..Case::default()
    };
    let refused = case.try_open().err().expect("the ring alone is larger");
    assert!(matches!(refused, OffloadError::Memory(_)), "{refused}");
    let case = Case {
        staging_bytes: 8192,
        ..Case::default()
    };
    let refused = case.try_open().err().expect("two tiles do not fit");
    assert!(
        refused.to_string().contains("staging ring has 8192 bytes"),
        "{refused}"
    );
    let case = Case {
        gathered_bytes: 0,
        ..Case::default()
    };
    assert!(matches!(
        case.try_open().err(),
        Some(OffloadError::NoFrames { .. })
    ));
}

/// Catches: a unit held ahead that leaves none for the next, and one refused for what was only read ahead.
#[test]
fn gathering_ahead_counts_what_is_held_and_not_what_was_read() {
    let case = Case {
        gathered_bytes: 4 << 20,
        engine: EngineKind::Threads,
        ..Case::default()
    };
    let offload = case.open_filled().expect("two units fit at a time");
    offload.gather(0, false).expect("one fits");
    assert_eq!(offload.gather_ahead(1, false).expect("two fit"), Some(true));
    assert!(!offload.has_room(2).expect("a unit"));
    assert_eq!(offload.gather_ahead(2, false).expect("no error"), None);
    assert!(offload.has_room(1).expect("it is held itself"));
    offload.release(0).expect("was gathered");
    assert!(offload.prefetch(2).expect("a frame is free"));
    assert_eq!(
        offload
            .gather_ahead(0, false)
            .expect("what was read ahead gives way"),
        Some(true)
    );
}

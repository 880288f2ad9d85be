//! The thread that goes on with a step between calls: what it finishes by itself, what it leaves, and what it reports.

mod harness;

use std::time::{Duration, Instant};

use harness::{Case, REFERENCE_STEPS, master, reference, sim, step};
use zeroxide_layout::{Format, ParamShape};
use zeroxide_offload::{GradientHome, Offload, OffloadError, StateHome, UnitSpec, WeightHome};
use zeroxide_optim::{AdamParams, Grad};
use zeroxide_storage::{EngineKind, Fault, FaultRule, OpKind, StorageError, Trigger};

const PATIENCE: Duration = Duration::from_mins(1);
const EIO: i32 = 5;

/// Waits until `done`, in short sleeps; the thread works meanwhile, and no call drives the step.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until nothing of the step goes on: no tile is updated and no byte moves for a while.
fn settle(offload: &Offload) {
    let seen = || {
        let report = offload.io().expect("open").expect("a disk");
        (report.tiles, report.counters)
    };
    let mut last = seen();
    let mut since = Instant::now();
    wait_for("the end of the step's own work", || {
        let now = seen();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(50)
    });
}

/// Catches: a step that stands still until somebody asks, a completion that nobody is told of, a staging ring that keeps its
/// memory after the last write.
#[test]
fn a_step_ends_while_nobody_calls() {
    for engine in [
        EngineKind::Auto,
        EngineKind::Threads,
        sim(|options| options.latency = Duration::from_micros(200)..Duration::from_millis(2)),
    ] {
        // With the weights in memory no window has to become free: nothing is in the way of the whole step.
        let case = Case {
            engine,
            weights: WeightHome::Host,
            staging_bytes: 256 << 10,
            ..Case::default()
        };
        let case_beside = Case {
            weights: WeightHome::Host,
            ..Case::default()
        };
        let (offload, asked) = (case.open(), case_beside.open());
        let done = |offload: &Offload| {
            let report = offload.io().expect("open").expect("a disk");
            let moved = report.counters;
            (report.tiles, moved.read.operations, moved.write.operations)
        };
        for index in 0..REFERENCE_STEPS {
            step(&offload, index).expect("no fault was asked for");
            step(&asked, index).expect("no fault was asked for");
            asked.finish().expect("no fault was asked for");
            let all = done(&asked);
            wait_for("the step's last write", || done(&offload) == all);
        }
        assert_eq!(master(&offload), reference());
    }
}

/// Four units of `TILES` tiles each, two of which have room at a time.
fn four_units(case: &Case) -> Offload {
    let units: Vec<UnitSpec> = (0..4)
        .map(|unit| UnitSpec {
            mesh: None,
            name: format!("unit {unit}"),
            held_through_backward: false,
            params: vec![ParamShape {
                numel: NUMEL,
                trainable: true,
            }],
            weights: WeightHome::Disk,
            state: StateHome::Disk,
            gradients: GradientHome::Host,
            optimizer: AdamParams::default().into(),
            format: Format::Split,
            streams: Vec::new(),
        })
        .collect();
    let offload = Offload::new(&case.settings(), &units).expect("nothing in the way");
    let values = harness::initial(0, 0, NUMEL);
    for unit in 0..units.len() {
        offload.fill_begin(unit, "weight").expect("empty");
        offload.fill_param(unit, 0, 0, &values).expect("fits");
        offload.fill_commit(unit).expect("filled");
    }
    offload
}

const TILES: u64 = 8;
const NUMEL: u64 = 2048 * TILES;

/// Catches: a window taken from a unit that is updated, or is about to be, and not used yet, whose weights are then read
/// twice; a window not waited for, with the same end.
#[test]
fn units_that_are_ready_for_the_next_pass_stay_until_it_uses_them() {
    let offload = four_units(&Case::default());
    let reads = || {
        let report = offload.io().expect("open").expect("a disk");
        report.counters.read.operations
    };
    let use_unit = |unit: usize| {
        // Each use comes when the thread has done all it can: it is as far ahead as it ever gets.
        settle(&offload);
        offload.gather(unit, false).expect("there is room");
    };
    let grad = harness::gradient(0, 0, 0, NUMEL);
    let mut before = reads();
    for step in 0..4 {
        for unit in 0..4 {
            use_unit(unit);
            offload.release(unit).expect("gathered");
        }
        for unit in (0..4).rev() {
            use_unit(unit);
            offload
                .accumulate(unit, 0, 0, Grad::F32(&grad), true)
                .expect("trainable");
            offload.release(unit).expect("gathered");
        }
        // Counted before the step, whose reads begin before it returns.
        settle(&offload);
        let after = reads();
        if step > 1 {
            // Of each unit the residual and both moments, and its weight once for the step or forward. Backward finds
            // the last two units of forward, and reads the first two.
            assert_eq!(
                after - before,
                4 * 4 * TILES - 2 * TILES + 2 * TILES,
                "step {step}"
            );
        }
        before = after;
        let step = offload.step(&[AdamParams::default().into()], 1.0);
        step.expect("no fault was asked for");
    }
}

/// Catches: an error that the thread swallows, or that comes out as nothing but the state it has left.
#[test]
fn what_goes_wrong_between_calls_is_raised_by_the_next_one() {
    for kind in [OpKind::Read, OpKind::Write] {
        let case = Case {
            engine: sim(|options| {
                options.faults = vec![FaultRule {
                    kind: Some(kind),
                    when: Trigger::From(60),
                    fault: Fault::Errno(EIO),
                }];
            }),
            weights: WeightHome::Host,
            ..Case::default()
        };
        let offload = case.open();
        let failure = (0..40).find_map(|index| {
            let outcome = step(&offload, index);
            settle(&offload);
            outcome.err()
        });
        assert!(
            matches!(
                failure,
                Some(OffloadError::Storage(StorageError::Io { .. }))
            ),
            "{failure:?}"
        );
        let after = step(&offload, 0).expect_err("the state is mixed");
        assert!(matches!(after, OffloadError::Poisoned { .. }), "{after}");
        offload.close(&[]).expect("closing works after a failure");
    }
}

/// Catches: a thread that outlives its object, or that the end of it waits for without end, while a step is under way.
#[test]
fn closing_and_dropping_end_the_thread_in_the_middle_of_a_step() {
    let named = || {
        std::fs::read_dir("/proc/self/task")
            .expect("Linux")
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.trim() == "zx-step")
            .count()
    };
    for close in [true, false] {
        let case = Case {
            engine: sim(|options| {
                options.latency = Duration::from_millis(1)..Duration::from_millis(3);
            }),
            ..Case::default()
        };
        let offload = case.open();
        step(&offload, 0).expect("no fault was asked for");
        assert!(named() >= 1);
        if close {
            offload.close(&[]).expect("nothing in the way");
        }
        drop(offload);
    }
    // Other tests of this file have threads of their own, which end with them.
    wait_for("the threads' end", || named() == 0);
}

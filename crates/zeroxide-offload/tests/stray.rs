//! Weights that are read when nobody has announced it: by views that outlive the use of their unit.

mod harness;

use std::sync::Arc;
use std::time::Duration;

use harness::Case;
use zeroxide_optim::Grad;
use zeroxide_storage::EngineKind;

/// Catches: a gather that fails, or waits for ever, where only units in use have frames; a unit whose frames were taken
/// and whose reader then faults or sees another unit's bytes; half of what is being read ahead shown to a reader.
#[test]
fn a_unit_in_use_gives_way_and_comes_back_when_it_is_read() {
    let case = Case {
        gathered_bytes: 2 << 20,
        engine: EngineKind::Threads,
        ..Case::default()
    };
    let offload = case.open_filled().expect("one unit fits at a time");
    let first = |unit: usize| {
        let (address, _, _) = offload.window(unit).expect("open").expect("not borrowed");
        let address = std::ptr::with_exposed_provenance::<u32>(address);
        // SAFETY: reads of a window come back with the unit's weights, whatever its frames are used for.
        unsafe { address.read_volatile() }
    };
    let bytes = |unit: usize| {
        offload.gather(unit, false).expect("fits alone");
        let found = first(unit);
        offload.release(unit).expect("was gathered");
        found
    };
    let expected = [bytes(0), bytes(1)];
    assert_ne!(expected[0], expected[1]);
    offload.gather(0, false).expect("one fits");
    assert!(!offload.prefetch(1).expect("refused without an error"));
    offload.gather(1, false).expect("the other one gives way");
    for round in 0..50 {
        assert_eq!(first(round % 2), expected[round % 2]);
    }
    offload.release(1).expect("was gathered");
    for round in 0..50 {
        assert!(offload.prefetch(round % 2).expect("nobody is in use"));
        assert_eq!(first(round % 2), expected[round % 2]);
    }
}

/// Catches: values taken from weights that are away, or given to them, by a call that keeps what bringing them needs.
#[test]
fn a_call_may_be_given_weights_that_are_away() {
    let case = Case {
        gathered_bytes: 2 << 20,
        engine: EngineKind::Threads,
        ..Case::default()
    };
    let offload = Arc::new(case.open_filled().expect("one unit fits at a time"));
    let (address, _, _) = offload.window(1).expect("open").expect("not borrowed");
    let (told, heard) = std::sync::mpsc::channel();
    // Not joined: a call that waits for itself would hang the test instead of failing it.
    std::thread::spawn(move || {
        let pointer = std::ptr::with_exposed_provenance_mut::<f32>(address);
        let away = || offload.gather(0, false).expect("the other one gives way");
        away();
        // SAFETY: the range stays reserved for as long as `offload` lives, and reads of it come back with the unit's
        // weights; nobody writes them meanwhile.
        let values = unsafe { std::slice::from_raw_parts(pointer, 8) };
        offload.write_grad(0, 0, 0, values).expect("in range");
        let mut found = [0.0; 8];
        offload.read_grad(0, 0, 0, &mut found).expect("written");
        assert_eq!(
            found.map(f32::to_bits)[..],
            values
                .iter()
                .map(|value| value.to_bits())
                .collect::<Vec<_>>()
        );
        away();
        let part = Grad::F32(values);
        offload.accumulate(0, 0, 0, part, false).expect("a part");
        away();
        // SAFETY: as above, and the slice is the only one in use from here on.
        let out = unsafe { std::slice::from_raw_parts_mut(pointer, 8) };
        offload.read_grad(0, 0, 0, out).expect("written");
        told.send(()).expect("somebody listens");
    });
    heard
        .recv_timeout(Duration::from_mins(1))
        .expect("no call waits for itself");
}

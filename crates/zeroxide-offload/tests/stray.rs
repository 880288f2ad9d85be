//! Weights that are read when nobody has announced it: by views that outlive the use of their unit.

mod harness;

use harness::Case;
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

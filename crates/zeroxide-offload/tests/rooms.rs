//! Gradients that the caller sums: what leaves has nothing between parameters, and a sum is taken as one of all ranks.

use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_offload::{
    GradientHome, Mesh, MeshPosition, Offload, Quantisation, Room, Settings, StateHome, Transport,
    UnitSpec, WeightHome,
};
use zeroxide_optim::{AdamParams, Grad};
use zeroxide_storage::{EngineKind, SimOptions};

const NUMEL: usize = 100;
/// Of a layout over two ranks: parameters at 0 and 128, and padding to 2,048 for each rank.
const SLICE: usize = 2048;

/// One of two ranks, with two parameters whose gradients travel as integers; or as they are.
fn open(gradients: bool) -> Offload {
    let param = ParamShape {
        numel: NUMEL as u64,
        trainable: true,
    };
    let unit = UnitSpec {
        mesh: None,
        name: "unit".into(),
        held_through_backward: false,
        params: vec![param, param],
        weights: WeightHome::Shard,
        state: StateHome::Host,
        gradients: GradientHome::Host,
        optimizer: AdamParams::default().into(),
        format: Format::Fp32,
        streams: Vec::new(),
    };
    let settings = Settings {
        mesh: MeshPosition {
            groups: Mesh {
                rank: 0,
                shards: 2,
                replicas: 1,
            },
            transport: Transport::Collective,
        },
        comm_dtype: Dtype::F32,
        quantisation: Quantisation {
            gradients,
            feedback: gradients,
            ..Quantisation::default()
        },
        reduce_scale: 0.5,
        defers_steps: false,
        limit: None,
        threads: 1,
        compute: Dtype::F32,
        grad: Dtype::F32,
        tile_elements: 2048,
        staging_bytes: 0,
        gathered_bytes: 2 << 20,
        engine: EngineKind::Simulated(SimOptions::default()),
        queue_depth: 1,
        directories: Vec::new(),
        shares: Vec::new(),
        job: "rooms".into(),
        speculates: false,
        durable: None,
    };
    Offload::new(&settings, &[unit]).expect("nothing in the way")
}

fn accumulate_and_send(core: &Offload, value: f32) {
    for param in 0..2 {
        let gradient = vec![value; NUMEL];
        core.accumulate(0, param, 0, Grad::F32(&gradient), true)
            .expect("trainable");
    }
    core.send(0).expect("once");
}

#[expect(unsafe_code, reason = "memory that the core lends to its caller")]
fn outgoing(core: &mut Offload) -> &mut [f32] {
    let (address, bytes) = core.outgoing(0).expect("sent");
    let start = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: the memory is the caller's until the unit is received, and no other slice of it is used meanwhile.
    unsafe { std::slice::from_raw_parts_mut(start, bytes / size_of::<f32>()) }
}

/// Catches: what another unit has left between parameters, which would decide a scale.
#[test]
fn nothing_lies_between_parameters_that_leave() {
    let mut core = open(true);
    accumulate_and_send(&core, 1.0);
    outgoing(&mut core).fill(f32::NAN);
    core.receive_sum(0, &[0.0; SLICE]).expect("sent");
    accumulate_and_send(&core, 2.0);
    let sent = outgoing(&mut core);
    assert_eq!(sent.len(), 2 * SLICE);
    for (at, value) in sent.iter().enumerate() {
        let expected = if at % 128 < NUMEL && at < 256 {
            2.0
        } else {
            0.0
        };
        assert!((value - expected).abs() < f32::EPSILON, "{value} at {at}");
    }
}

/// Catches: a sum that is not scaled, replaces what was there, counts padding, or is of another length; and one of a unit
/// that was never sent.
#[test]
fn a_sum_is_taken_as_that_of_all_ranks() {
    let core = open(true);
    let mut sums = vec![1e30; SLICE];
    sums[..NUMEL].fill(3.0);
    sums[128..128 + NUMEL].fill(-4.0);
    assert!(core.receive_sum(0, &sums).is_err(), "nothing was sent");
    for _ in 0..2 {
        accumulate_and_send(&core, 1.0);
        core.receive_sum(0, &sums).expect("sent");
    }
    let norm = core.grad_norm().expect("usable");
    // Twice half of each: 3 and -4.
    let expected = 25.0 * f64::from(u32::try_from(NUMEL).expect("small"));
    assert!((norm.sum_squares - expected).abs() < 1e-6 * expected);
    assert!(!norm.nonfinite);
    let mut found = vec![0.0; NUMEL];
    core.read_grad(0, 1, 0, &mut found).expect("kept");
    assert!(found.iter().all(|value| (value + 4.0).abs() < f32::EPSILON));
    sums[3] = f32::NAN;
    accumulate_and_send(&core, 1.0);
    core.receive_sum(0, &sums).expect("sent");
    assert!(core.grad_norm().expect("usable").nonfinite);
    accumulate_and_send(&core, 1.0);
    let error = core.receive_sum(0, &sums[..64]).expect_err("too short");
    assert!(
        error.to_string().contains("64 sums of unit unit"),
        "{error}"
    );
}

/// Catches: rooms that the plan does not have, or of another size.
#[test]
fn rooms_are_those_of_the_plan() {
    let core = open(true);
    // fp32 sums, and a message: half a byte for each element and two for each 256.
    let incoming = (4 * SLICE + SLICE / 2 + SLICE / 128).next_multiple_of(4096);
    assert_eq!(core.room(Room::Incoming).expect("planned").1, incoming);
    assert_eq!(core.room(Room::Residuals).expect("planned").1, 2 * SLICE);
    assert!(core.room(Room::Codes).is_err());
    let core = open(false);
    for room in [Room::Incoming, Room::Residuals, Room::Codes] {
        let error = core.room(room).expect_err("nothing travels as integers");
        assert!(error.to_string().contains("no room"), "{error}");
    }
}

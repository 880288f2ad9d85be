//! Gradients that the caller puts where the core keeps them: the bits and the norm of those that are accumulated.

use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_offload::{
    GradientHome, Mesh, MeshPosition, Offload, Quantisation, Settings, StateHome, Transport,
    UnitSpec, WeightHome,
};
use zeroxide_optim::{AdamParams, Grad};
use zeroxide_storage::{EngineKind, SimOptions};

const NUMEL: usize = 5000;

/// One rank, with two trainable parameters and a frozen one.
fn open() -> Offload {
    let param = |trainable| ParamShape {
        numel: NUMEL as u64,
        trainable,
    };
    let unit = UnitSpec {
        mesh: None,
        name: "unit".into(),
        held_through_backward: false,
        params: vec![param(true), param(true), param(false)],
        weights: WeightHome::Host,
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
                shards: 1,
                replicas: 1,
            },
            transport: Transport::Collective,
        },
        comm_dtype: Dtype::F32,
        quantisation: Quantisation::default(),
        reduce_scale: 1.0,
        defers_steps: false,
        limit: None,
        threads: 1,
        compute: Dtype::F32,
        grad: Dtype::F32,
        tile_elements: 2048,
        staging_bytes: 0,
        gathered_bytes: 0,
        engine: EngineKind::Simulated(SimOptions::default()),
        queue_depth: 1,
        directories: Vec::new(),
        shares: Vec::new(),
        job: "arrivals".into(),
        speculates: false,
        durable: None,
    };
    Offload::new(&settings, &[unit]).expect("nothing in the way")
}

#[expect(
    clippy::cast_precision_loss,
    reason = "small integers, which fp32 has exactly"
)]
fn gradient(param: usize) -> Vec<f32> {
    (0..NUMEL)
        .map(|at| (at % 97) as f32 * 0.37 - param as f32)
        .collect()
}

#[expect(unsafe_code, reason = "memory that the core lends to its caller")]
fn put(core: &mut Offload, param: usize, values: &[f32]) {
    let (address, bytes) = core
        .gradient_room(0, param)
        .expect("trainable")
        .expect("none has come");
    assert_eq!(bytes, size_of_val(values));
    let start = std::ptr::with_exposed_provenance_mut::<f32>(address);
    // SAFETY: the memory is the caller's until the core is told, and no other slice of it is used meanwhile.
    unsafe { std::slice::from_raw_parts_mut(start, values.len()) }.copy_from_slice(values);
    core.gradient_arrived(0, param).expect("there was room");
}

fn read(core: &Offload, param: usize) -> Vec<u32> {
    let mut out = vec![0.0; NUMEL];
    core.read_grad(0, param, 0, &mut out).expect("it has come");
    out.into_iter().map(f32::to_bits).collect()
}

/// Catches: a place that is another parameter's, a norm with other bits, a first gradient that is added to the last
/// step's.
#[test]
fn what_is_put_there_counts_as_what_is_accumulated() {
    let (mut put_there, accumulated) = (open(), open());
    for step in 0..2 {
        for param in [1, 0] {
            let values = gradient(param + step);
            put(&mut put_there, param, &values);
            accumulated
                .accumulate(0, param, 0, Grad::F32(&values), true)
                .expect("trainable");
        }
        // Whatever comes next is added.
        assert_eq!(put_there.gradient_room(0, 0).expect("trainable"), None);
        for core in [&put_there, &accumulated] {
            core.accumulate(0, 0, 0, Grad::F32(&gradient(5)), true)
                .expect("trainable");
        }
        let norm = put_there.grad_norm().expect("open");
        assert_eq!(norm, accumulated.grad_norm().expect("open"));
        assert_eq!(norm.accumulated, 2);
        for param in [0, 1] {
            assert_eq!(read(&put_there, param), read(&accumulated, param));
        }
        for core in [&put_there, &accumulated] {
            core.clear_gradients().expect("open");
        }
    }
}

#[test]
fn an_arrival_that_was_not_announced_is_refused_and_one_that_failed_begins_anew() {
    let mut core = open();
    assert!(core.gradient_arrived(0, 0).is_err());
    assert!(core.gradient_room(0, 2).is_err(), "it is frozen");
    core.gradient_room(0, 0).expect("trainable").expect("room");
    assert!(!core.has_gradient(0, 0).expect("open"));
    // Its backward failed; the next one brings another.
    put(&mut core, 0, &gradient(3));
    assert!(core.has_gradient(0, 0).expect("open"));
    assert!(core.gradient_arrived(0, 0).is_err());
    core.gradient_room(0, 1).expect("trainable").expect("room");
    core.clear_gradients().expect("open");
    assert!(core.gradient_arrived(0, 1).is_err());
}

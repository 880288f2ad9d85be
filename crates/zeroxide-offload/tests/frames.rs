//! Which unit gives up its frames must not depend on what the disk has done, or ranks would gather different units.

use std::time::Duration;

use zeroxide_layout::{Dtype, Format, ParamShape};
use zeroxide_offload::{
    GradientHome, Mesh, MeshPosition, Offload, Quantisation, Settings, StateHome, Transport,
    UnitSpec, WeightHome,
};
use zeroxide_optim::{AdamParams, Grad};
use zeroxide_storage::{EngineKind, SimOptions};

const NUMEL: u64 = 64 << 10;
const TRAINED: usize = 0;
const FROZEN: usize = 1;
const NEXT: usize = 2;

/// One of two ranks; the other is not needed, since the caller carries everything. Two of the three units have room.
fn open(directory: &std::path::Path) -> Offload {
    let units: Vec<UnitSpec> = (0..3)
        .map(|unit| UnitSpec {
            mesh: None,
            name: format!("unit {unit}"),
            held_through_backward: false,
            params: vec![ParamShape {
                numel: NUMEL,
                trainable: unit != FROZEN,
            }],
            weights: WeightHome::Shard,
            state: StateHome::Disk,
            gradients: GradientHome::Host,
            optimizer: AdamParams::default().into(),
            format: Format::Split,
            streams: Vec::new(),
        })
        .collect();
    let slow = SimOptions {
        latency: Duration::from_millis(20)..Duration::from_millis(21),
        ..SimOptions::default()
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
        quantisation: Quantisation::default(),
        reduce_scale: 0.5,
        defers_steps: false,
        limit: None,
        threads: 1,
        compute: Dtype::Bf16,
        grad: Dtype::F32,
        tile_elements: 2048,
        staging_bytes: 1 << 20,
        gathered_bytes: 4 << 20,
        engine: EngineKind::Simulated(slow),
        queue_depth: 4,
        directories: vec![directory.to_path_buf()],
        shares: Vec::new(),
        job: "frames".into(),
        speculates: false,
        durable: None,
    };
    let offload = Offload::new(&settings, &units).expect("nothing in the way");
    for unit in 0..units.len() {
        offload.fill_begin(unit, "weight").expect("empty");
        let values = vec![1.0; usize::try_from(NUMEL).expect("small")];
        offload.fill_param(unit, 0, 0, &values).expect("fits");
        offload.fill_commit(unit).expect("filled");
    }
    offload
}

/// Catches: a unit whose update is under way passed over, and the frames of one taken that was used later.
#[test]
fn the_unit_used_longest_ago_gives_way_though_its_update_is_under_way() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let offload = open(directory.path());
    let gather = |unit: usize| {
        let whole = offload.gather(unit, false).expect("there is room");
        offload.set_all_shards_valid(unit).expect("gathered");
        whole
    };
    assert!(!gather(TRAINED));
    let grad = vec![1.0_f32; usize::try_from(NUMEL).expect("small")];
    offload
        .accumulate(TRAINED, 0, 0, Grad::F32(&grad), true)
        .expect("trainable");
    offload.release(TRAINED).expect("gathered");
    offload.send(TRAINED).expect("once");
    offload.incoming(TRAINED).expect("sent");
    offload.receive_from(TRAINED).expect("sent and received");
    assert!(!gather(FROZEN));
    offload.release(FROZEN).expect("gathered");
    offload
        .step(&[AdamParams::default().into()], 1.0)
        .expect("works");
    assert!(!gather(NEXT));
    let after = offload.io().expect("usable").expect("a disk").tiles;
    assert!(
        after < NUMEL / 2 / 2048,
        "the update is still under way, and nobody waited for it"
    );
    offload.release(NEXT).expect("gathered");
    assert!(gather(FROZEN), "it was used last and is still there");
    offload.release(FROZEN).expect("gathered");
    assert!(!gather(TRAINED));
    offload.finish().expect("nothing in the way");
}

//! What a plan says that each bucket takes is what the core reserves, over random units, worlds, homes, rules and
//! formats.

use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use zeroxide_layout::{Dtype, Format, ParamShape, StateLayout};
use zeroxide_memory::Bucket;
use zeroxide_offload::{MeshPosition, Offload, Settings, Transport, UnitSpec};
use zeroxide_optim::Optimizer;
use zeroxide_plan::{
    Buckets, Dtypes, GradientHome, Mesh, Plan, PlanRequest, Quantisation, StateBytes, UnitRequest,
};
use zeroxide_storage::{EngineKind, SimOptions};

#[derive(Clone, Debug)]
struct Job {
    request: PlanRequest,
    /// Rule and format of each unit.
    rules: Vec<(Optimizer, Format)>,
}

impl Job {
    fn plan(&self) -> Plan {
        Plan::new(self.request.clone()).expect("nothing is limited")
    }

    /// The core of one rank, made as its plan says.
    fn core(&self, plan: &Plan, rank: u32, directory: &TempDir, limit: u64) -> Offload {
        let specs: Vec<UnitSpec> = plan
            .placement
            .units
            .iter()
            .zip(&self.rules)
            .map(|(unit, (optimizer, format))| UnitSpec {
                mesh: None,
                name: unit.shape.name.clone(),
                held_through_backward: unit.shape.held_through_backward,
                params: unit.shape.params.clone(),
                weights: plan.weights,
                state: plan.state,
                gradients: plan.gradients,
                optimizer: *optimizer,
                format: *format,
                streams: vec![0; unit.shape.params.len()],
            })
            .collect();
        let Dtypes {
            compute,
            grad,
            comm,
        } = self.request.dtypes;
        let mesh = plan.placement.mesh;
        let settings = Settings {
            mesh: MeshPosition {
                groups: Mesh { rank, ..mesh },
                transport: self.request.transport,
            },
            comm_dtype: comm,
            quantisation: Quantisation::default(),
            reduce_scale: 1.0,
            defers_steps: false,
            limit: Some(limit),
            threads: 1,
            compute,
            grad,
            tile_elements: plan.tile_elements,
            staging_bytes: plan.staging_bytes,
            gathered_bytes: plan.gathered_bytes,
            engine: EngineKind::Simulated(SimOptions::default()),
            queue_depth: 8,
            directories: vec![directory.path().to_path_buf()],
            shares: Vec::new(),
            job: format!("rank {rank}"),
            speculates: false,
            durable: None,
        };
        Offload::new(&settings, &specs).expect("what the plan says is enough")
    }
}

fn reserved(core: &Offload) -> Buckets {
    let current = |bucket| core.usage(bucket).current;
    Buckets {
        weights: current(Bucket::Weights),
        gradients: current(Bucket::Gradients),
        optimizer: current(Bucket::Optimizer),
        staging: current(Bucket::Staging),
        gathered: current(Bucket::Gathered),
    }
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::F16)]
}

fn units() -> impl Strategy<Value = Vec<(bool, Vec<(u64, bool)>)>> {
    let numel = prop_oneof![Just(0_u64), 1..200_u64, 1..40_000_u64];
    let unit = (
        any::<bool>(),
        prop::collection::vec((numel, any::<bool>()), 1..4),
    );
    prop::collection::vec(unit, 1..6)
}

const HOMES: [GradientHome; 3] = [
    GradientHome::Host,
    GradientHome::Disk,
    GradientHome::Consumed,
];

prop_compose! {
    fn job()(
        world in 1..5_u32, stage in 0..4_u8, collective: bool, dtypes in (dtype(), dtype(), dtype()),
        on_disk in any::<(bool, bool)>(), units in units(), prefetch in 0..3_usize,
        kinds in prop::collection::vec((0..Optimizer::every().len(), any::<bool>()), 6),
        tile in 0..5_u64, odd_ring: bool, waiting in 0..3_usize,
    ) -> Job {
        let (compute, grad, comm) = dtypes;
        let rules: Vec<(Optimizer, Format)> = kinds
            .into_iter()
            .map(|(kind, split)| {
                let split = split && compute == Dtype::Bf16;
                (Optimizer::every()[kind], if split { Format::Split } else { Format::Fp32 })
            })
            .collect();
        let layout = |index: usize| {
            let (optimizer, format) = &rules[index];
            StateLayout::new(compute, *format, &optimizer.moments()).expect("a pair that exists")
        };
        let units = units.into_iter().enumerate().map(|(index, (held, params))| UnitRequest {
mesh: None,
            name: format!("unit {index}"),
            params: params
                .iter()
                // With several ranks a unit is trainable or frozen as a whole.
                .map(|(numel, trainable)| ParamShape {
                    numel: *numel,
                    trainable: if world == 1 { *trainable } else { params[0].1 },
                })
                .collect(),
            held_through_backward: held,
            state_bytes: StateBytes::of(&layout(index)),
            turn: u32::try_from(index).expect("few"),
        });
        let (shards, replicas) = match (stage, world) {
            (0, _) => (1, world),
            (_, 4) if odd_ring => (2, 2),
            _ => (world, 1),
        };
        let request = PlanRequest {
            mesh: Mesh { rank: 0, shards, replicas },
            stage, prefetch,
            transport: if collective { Transport::Collective } else { Transport::Shared },
            dtypes: Dtypes { compute, grad, comm },
            quantisation: Quantisation::default(),
            weights_on_disk: on_disk.0,
            state_on_disk: on_disk.1,
            gradients: Some(HOMES[waiting]),
            pinned: 0,
            units: units.collect(),
            tile_bytes: (tile > 0).then_some(tile * 8192),
            staging_bytes: odd_ring.then_some((4 << 20) + 1),
            limit: None,
            resident: 0,
            device: None,
        };
        Job { request, rules }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_core_reserves_what_the_plan_says(job in job()) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let plan = job.plan();
        let world = job.request.mesh.world();
        let (made, loaded) = (plan.peak_buckets(false), plan.peak_buckets(true));
        // The budget is as large as the plan says, and not a byte larger.
        let most = loaded.total();
        let cores: Vec<Arc<Offload>> =
            (0..world).map(|rank| Arc::new(job.core(&plan, rank, &directory, most))).collect();
        let handles: Vec<_> = cores
            .iter()
            .filter_map(|core| core.segment_handle().expect("a live core"))
            .collect();
        for core in &cores {
            if !handles.is_empty() {
                core.join(&handles).expect("ranks of one process reach one another");
            }
            prop_assert_eq!(reserved(core), plan.buckets);
        }
        // Initial values and then those of a checkpoint: filling takes what the plan says.
        for core in &cores {
            let fill = |unit: usize, name: &str| {
                core.fill_begin(unit, name).expect("the plan counts what filling takes");
                core.fill_commit(unit).expect("the simulated disk takes it");
            };
            for unit in 0..plan.placement.units.len() {
                fill(unit, "weight");
            }
            prop_assert_eq!(reserved(core), plan.buckets);
            prop_assert_eq!(core.usage(Bucket::Staging).peak, made.staging);
            prop_assert_eq!(core.total_usage().peak, made.total());
            for unit in 0..plan.placement.units.len() {
                for moment in job.rules[unit].0.moments() {
                    fill(unit, moment.key.name());
                }
            }
            prop_assert_eq!(reserved(core), plan.buckets);
            prop_assert_eq!(core.usage(Bucket::Staging).peak, loaded.staging);
            prop_assert_eq!(core.total_usage().peak, loaded.total());
        }
        for core in &cores {
            core.close(&[]).expect("nothing is in flight");
        }
    }
}

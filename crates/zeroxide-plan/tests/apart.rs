//! Units that only some of the ranks train, such as experts: what a rank keeps of them, and what it exchanges.

use zeroxide_layout::{Dtype, ParamShape};
use zeroxide_plan::{
    CollectiveKind, Dtypes, Mesh, Plan, PlanRequest, Quantisation, Schedule, StateBytes, Transport,
    UnitRequest, WeightHome,
};

/// Elements of each unit: the padded length over 1, 2 or 4 ranks.
const NUMEL: u64 = 4 * 2048;

/// Rank 1 of 4 at stage 3: a unit of all ranks, and one of the ranks of `mesh`.
fn plan(mesh: Mesh) -> Plan {
    let unit = |index: u32, mesh: Option<Mesh>| UnitRequest {
        mesh,
        name: format!("unit {index}"),
        params: vec![ParamShape {
            numel: NUMEL,
            trainable: true,
        }],
        held_through_backward: false,
        state_bytes: StateBytes::default(),
        turn: index,
    };
    Plan::new(PlanRequest {
        mesh: Mesh {
            rank: 1,
            shards: 4,
            replicas: 1,
        },
        stage: 3,
        transport: Transport::Collective,
        dtypes: Dtypes {
            compute: Dtype::Bf16,
            grad: Dtype::F32,
            comm: Dtype::F32,
        },
        quantisation: Quantisation::default(),
        weights_on_disk: false,
        state_on_disk: false,
        gradients: None,
        pinned: 0,
        units: vec![unit(0, None), unit(1, Some(mesh))],
        prefetch: 1,
        tile_bytes: None,
        staging_bytes: None,
        limit: None,
        resident: 0,
        device: None,
    })
    .expect("nothing is limited")
}

/// (kind, bytes sent) of each collective of a unit in a step.
fn sent(plan: &Plan, unit: usize) -> Vec<(CollectiveKind, u64)> {
    let all = Schedule::new(plan).collectives.into_iter();
    all.filter(|each| each.unit == unit)
        .map(|each| (each.kind, each.sent))
        .collect()
}

/// Catches: a shard cut for all ranks, and bytes to ranks that do not train the unit.
#[test]
fn two_of_four_ranks_share_what_they_train() {
    let plan = plan(Mesh {
        rank: 1,
        shards: 2,
        replicas: 1,
    });
    let units = &plan.placement.units;
    assert_eq!(
        (units[0].local.base, units[0].local.own),
        (NUMEL / 4, NUMEL / 4)
    );
    assert_eq!(
        (units[1].local.base, units[1].local.own),
        (NUMEL / 2, NUMEL / 2)
    );
    assert_eq!(units[1].shape.weights, WeightHome::Shard);
    for (unit, part, others) in [(0, NUMEL / 4, 3), (1, NUMEL / 2, 1)] {
        for (kind, bytes) in sent(&plan, unit) {
            let size = if kind == CollectiveKind::AllToAll {
                4
            } else {
                2
            };
            assert_eq!(bytes, part * size * others, "{kind:?} of unit {unit}");
        }
        assert!(!sent(&plan, unit).is_empty());
    }
}

/// Catches: a unit that is kept twice, at home and under its window, and collectives of one rank.
#[test]
fn a_rank_alone_keeps_all_and_sends_nothing() {
    let plan = plan(Mesh::ALONE);
    let alone = &plan.placement.units[1];
    assert_eq!(
        (alone.local.base, alone.local.own, alone.local.kept),
        (0, NUMEL, NUMEL)
    );
    assert_eq!(alone.shape.weights, WeightHome::Host);
    assert_eq!(sent(&plan, 1), []);
    assert_eq!(plan.placement.units[0].shape.weights, WeightHome::Shard);
}

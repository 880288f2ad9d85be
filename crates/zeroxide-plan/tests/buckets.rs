//! Buckets against sums written out here by hand, over random units, meshes, homes and dtypes.

use proptest::prelude::*;
use zeroxide_layout::{Dtype, Format, Moment, ParamShape, StateKey, StateLayout};
use zeroxide_plan::{
    Buckets, Dtypes, GradientHome, Mesh, Passed, Plan, PlanError, PlanRequest, Quantisation,
    Schedule, StateBytes, Transport, UnitRequest,
};

const FRAME: u64 = 2 << 20;

fn up(n: u64, to: u64) -> u64 {
    n.div_ceil(to) * to
}

/// Trainable and all elements of a unit's layout, by the rules of the layout's documentation.
fn padded(unit: &UnitRequest, world: u64) -> (u64, u64) {
    let part = |trainable: bool| {
        let params = || {
            unit.params
                .iter()
                .filter(move |each| each.trainable == trainable)
        };
        let end = params().fold(0, |end, each| up(end, 64) + each.numel);
        let least = u64::from(params().next().is_some());
        up(end.max(least), 2048 * world)
    };
    (part(true), part(true) + part(false))
}

/// The buckets of a plan with default tiles and ring, from the documentation of each bucket.
fn by_hand(request: &PlanRequest, ring: u64) -> Buckets {
    let Dtypes {
        compute,
        grad,
        comm,
    } = request.dtypes;
    let (compute, grad, comm) = (
        compute.size() as u64,
        grad.size() as u64,
        comm.size() as u64,
    );
    let world = u64::from(request.mesh.world());
    let shards = u64::from(request.mesh.shards);
    let collective = request.transport == Transport::Collective;
    let sharded = request.stage == 3 && collective && world > 1;
    let units: Vec<_> = request
        .units
        .iter()
        .map(|unit| (unit, padded(unit, world)))
        .collect();
    let all: u64 = units.iter().map(|(_, size)| size.1).sum();
    let kept: u64 = units.iter().map(|(_, size)| size.0).sum::<u64>() / shards;
    let weights = match (request.weights_on_disk, sharded) {
        (true, _) => 0,
        (false, true) => all / shards * compute,
        (false, false) => all * compute,
    };
    let mut transit = 0;
    if world > 1 {
        let long = |held: bool| {
            units
                .iter()
                .filter(move |(unit, size)| unit.held_through_backward == held && size.0 > 0)
        };
        transit += long(true).map(|(_, size)| size.0 * comm).sum::<u64>();
        let largest = long(false).map(|(_, size)| size.0 * comm).max();
        transit += long(false).count().min(3) as u64 * largest.unwrap_or(0);
        if collective {
            let most = units.iter().map(|(_, size)| size.0).max().unwrap_or(0);
            // Where every rank keeps everything it gets all of the others', else those of one slice.
            let summed = if shards == 1 { most } else { most / world };
            transit += summed * comm * (world - 1);
        }
    }
    let mut waiting = kept * grad;
    let spills = request.state_on_disk && request.gradients == Some(GradientHome::Disk);
    if spills || request.gradients == Some(GradientHome::Consumed) {
        let room = |held: bool| {
            units
                .iter()
                .filter(move |(unit, size)| unit.held_through_backward == held && size.0 > 0)
                .map(move |(_, size)| size.0 / shards * grad)
        };
        let turns = room(false).count().min(2) as u64;
        waiting = room(true).sum::<u64>() + turns * room(false).max().unwrap_or(0);
    }
    let state = units
        .iter()
        .map(|(unit, size)| unit.state_bytes.paged(size.0 / shards))
        .sum();
    let touches = |size: &(u64, u64)| request.weights_on_disk || size.0 > 0;
    let on_disk = request.weights_on_disk || request.state_on_disk;
    let ringed = on_disk && units.iter().any(|(_, size)| touches(size));
    Buckets {
        weights,
        gradients: waiting + transit,
        optimizer: if request.state_on_disk { 0 } else { state },
        staging: if ringed { ring } else { 0 },
        gathered: if request.weights_on_disk || sharded {
            gathered(request, &units, compute, world)
        } else {
            0
        },
    }
}

fn gathered(
    request: &PlanRequest,
    units: &[(&UnitRequest, (u64, u64))],
    compute: u64,
    world: u64,
) -> u64 {
    let frames: Vec<u64> = units
        .iter()
        .map(|(_, size)| up(size.1 * compute, FRAME))
        .collect();
    let chosen = |held: bool| {
        frames
            .iter()
            .zip(units)
            .filter(move |(_, (unit, _))| unit.held_through_backward == held)
            .map(|(bytes, _)| *bytes)
    };
    let others: Vec<u64> = chosen(false).collect();
    let ahead = request.prefetch;
    let reading = usize::from(request.weights_on_disk && world > 1 && ahead > 0);
    let row = (ahead + 1 + reading).min(others.len());
    let mut most = 0;
    for start in 0..=others.len() - row {
        most = most.max(others[start..start + row].iter().sum());
    }
    let bytes = chosen(true).sum::<u64>() + most;
    if world > 1 {
        return bytes;
    }
    let mut sorted = frames.clone();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    bytes.max(sorted.iter().take(2).sum())
}

fn state_of(compute: Dtype, split: bool) -> StateBytes {
    let format = if split && compute == Dtype::Bf16 {
        Format::Split
    } else {
        Format::Fp32
    };
    let moments = ["exp_avg", "exp_avg_sq"].map(|name| Moment {
        signed: name == "exp_avg",
        key: StateKey::new(name),
        initial: 0.0,
    });
    StateBytes::of(&StateLayout::new(compute, format, &moments).expect("a pair that exists"))
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::F16)]
}

fn units() -> impl Strategy<Value = Vec<(bool, Vec<(u64, bool)>)>> {
    let numel = prop_oneof![Just(0_u64), 1..200_u64, 1..2_000_000_u64];
    let unit = (
        any::<bool>(),
        prop::collection::vec((numel, any::<bool>()), 1..5),
    );
    prop::collection::vec(unit, 1..8)
}

const HOMES: [GradientHome; 3] = [
    GradientHome::Host,
    GradientHome::Disk,
    GradientHome::Consumed,
];

prop_compose! {
    fn request()(
        (shards, replicas) in prop_oneof![Just((1, 1)), (1..5_u32, 1..4_u32)], stage in 0..4_u8, collective: bool,
        dtypes in (dtype(), dtype(), dtype()), on_disk in any::<(bool, bool)>(), split: bool,
        units in units(), prefetch in 0..4_usize, waiting in 0..3_usize,
    ) -> PlanRequest {
        let mesh = Mesh { rank: 0, shards, replicas };
        let (compute, grad, comm) = dtypes;
        let units = units.into_iter().enumerate().map(|(index, (held, params))| UnitRequest {
mesh: None,
            name: format!("unit {index}"),
            params: params
                .iter()
                // With several ranks a unit is trainable or frozen as a whole.
                .map(|(numel, trainable)| ParamShape {
                    numel: *numel,
                    trainable: if mesh.world() == 1 { *trainable } else { params[0].1 },
                })
                .collect(),
            held_through_backward: held,
            state_bytes: state_of(compute, split),
            turn: u32::try_from(index).expect("few"),
        });
        PlanRequest {
            mesh, stage, prefetch,
            transport: if collective { Transport::Collective } else { Transport::Shared },
            dtypes: Dtypes { compute, grad, comm },
            quantisation: Quantisation::default(),
            weights_on_disk: on_disk.0,
            state_on_disk: on_disk.1,
            gradients: Some(HOMES[waiting]),
            pinned: 0,
            units: units.collect(),
            tile_bytes: None, staging_bytes: None, limit: None, resident: 0, device: None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn buckets_are_the_sums_written_out(request in request()) {
        let plan = Plan::new(request.clone()).expect("nothing is limited");
        prop_assert_eq!(plan.buckets, by_hand(&request, 32 << 20));
    }

    #[test]
    fn pinned_state_is_of_whole_units_and_within_its_room(request in request(), pinned in 0..1_u64 << 28) {
        // Gradients of a unit whose state is in memory do not wait on disk: they are counted elsewhere.
        let gradients = Some(GradientHome::Host);
        let request = PlanRequest { state_on_disk: true, gradients, ..request };
        let none = Plan::new(request.clone()).expect("nothing is limited");
        let plan = Plan::new(PlanRequest { pinned, ..request }).expect("nothing is limited");
        prop_assert_eq!(none.buckets.optimizer, 0);
        prop_assert!(plan.buckets.optimizer <= pinned);
        // What is in memory is not on disk, and nothing is in both.
        prop_assert_eq!(
            plan.placement.disk_bytes() + plan.buckets.optimizer, none.placement.disk_bytes()
        );
        let room = pinned - plan.buckets.optimizer;
        for unit in &plan.placement.units {
            if unit.state_on_disk() {
                prop_assert!(unit.state_bytes() > room, "{} would fit", unit.shape.name);
            }
        }
    }

    #[test]
    fn more_room_for_pinned_state_moves_no_more_over_the_disk(
        request in request(), pinned in 0..1_u64 << 28, more in 0..1_u64 << 28,
    ) {
        let request = PlanRequest { state_on_disk: true, ..request };
        let moved = |pinned| {
            let plan = Plan::new(PlanRequest { pinned, ..request.clone() }).expect("nothing is limited");
            Schedule::new(&plan).written_bytes
        };
        prop_assert!(moved(pinned + more) <= moved(pinned));
        prop_assert!(moved(1 << 60) <= moved(pinned + more));
    }

    #[test]
    fn a_budget_is_enough_to_the_byte(request in request(), resident in 0..1_u64 << 40) {
        let plan = Plan::new(request.clone()).expect("nothing is limited");
        let need = resident + plan.peak_buckets(false).total();
        let with = |limit| Plan::new(PlanRequest { limit: Some(limit), resident, ..request.clone() });
        prop_assert!(with(need).is_ok());
        let error = with(need - 1).expect_err("one byte is missing");
        prop_assert_eq!(error.shortage().map(|(need, limit, _)| (need, limit)), Some((need, need - 1)));
        let filling = matches!(error, PlanError::OverBudgetFilling { .. });
        prop_assert_eq!(filling, plan.peak_buckets(false) != plan.buckets);
    }

    #[test]
    fn a_ring_is_enough_to_the_byte(request in request(), tile_bytes in 0..64_u64 << 20) {
        let request = PlanRequest { tile_bytes: Some(tile_bytes), ..request };
        let plan = Plan::new(request.clone()).expect("the ring grows with its tiles");
        let Some(need) = plan.placement.ring_minimum() else {
            return Ok(());
        };
        prop_assert!(plan.staging_bytes >= need.max(32 << 20));
        let with = |bytes| Plan::new(PlanRequest { staging_bytes: Some(bytes), ..request.clone() });
        prop_assert!(with(need).is_ok());
        prop_assert_eq!(with(need - 1).expect_err("one byte is missing").shortage(), Some((need, need - 1, "staging")));
    }
}

#[test]
fn refusals_name_numbers_and_help() {
    let request = PlanRequest {
        mesh: Mesh::ALONE,
        stage: 0,
        transport: Transport::Shared,
        dtypes: Dtypes {
            compute: Dtype::Bf16,
            grad: Dtype::Bf16,
            comm: Dtype::Bf16,
        },
        quantisation: Quantisation::default(),
        weights_on_disk: false,
        state_on_disk: false,
        gradients: None,
        pinned: 0,
        units: vec![UnitRequest {
            mesh: None,
            name: "only".into(),
            params: vec![ParamShape {
                numel: 10 << 20,
                trainable: true,
            }],
            held_through_backward: true,
            state_bytes: state_of(Dtype::Bf16, true),
            turn: 0,
        }],
        prefetch: 1,
        tile_bytes: None,
        staging_bytes: None,
        limit: Some(100 << 20),
        resident: 50 << 20,
        device: None,
    };
    assert_eq!(
        Plan::new(request.clone())
            .expect_err("140 MiB of state do not fit")
            .to_string(),
        "host_memory 100 MiB is too small by 90 MiB: the process already uses 50 and the state needs 140 \
         (weights 20, gradients 20, optimizer 100), before any activation; to help: offload the optimizer to nvme"
    );
    let on_disk = PlanRequest {
        weights_on_disk: true,
        state_on_disk: true,
        pinned: 0,
        ..request
    };
    assert_eq!(
        Plan::new(PlanRequest {
            limit: Some(140 << 20),
            ..on_disk.clone()
        })
        .expect_err("the ring has no room for the residual of the unit")
        .to_string(),
        "host_memory 140 MiB is too small by 2 MiB while the engine is made: the process already uses 50, the state \
         needs 72 (gradients 20, staging 32, gathered 20), and the initial values of the largest unit 20 beside the \
         staging ring; to help: raise host_memory by that much, or lower zeroxide.unit_bytes if no single parameter is as \
         large"
    );
    assert_eq!(
        Plan::new(PlanRequest {
            staging_bytes: Some(1 << 20),
            ..on_disk
        })
        .expect_err("a tile has 6 MiB")
        .to_string(),
        "zeroxide.staging_bytes is 1048576: the ring needs 12582912 bytes, two tiles of 6291456; raise it or lower \
         zeroxide.tile_bytes"
    );
}

#[test]
fn the_process_takes_what_a_backward_took_and_what_only_an_update_writes() {
    let made = |on_disk, numel| {
        let unit = UnitRequest {
            mesh: None,
            name: "one of two".into(),
            params: vec![ParamShape {
                numel,
                trainable: true,
            }],
            held_through_backward: true,
            state_bytes: state_of(Dtype::Bf16, true),
            turn: 0,
        };
        Plan::new(PlanRequest {
            mesh: Mesh::ALONE,
            stage: 0,
            transport: Transport::Shared,
            dtypes: Dtypes {
                compute: Dtype::Bf16,
                grad: Dtype::Bf16,
                comm: Dtype::Bf16,
            },
            quantisation: Quantisation::default(),
            weights_on_disk: on_disk,
            state_on_disk: on_disk,
            gradients: Some(GradientHome::Host),
            pinned: 0,
            units: vec![unit.clone(), unit],
            prefetch: 1,
            tile_bytes: None,
            staging_bytes: None,
            limit: None,
            resident: 0,
            device: None,
        })
        .expect("nothing is limited")
    };
    let (host, disk) = (made(false, 1 << 20), made(true, 1 << 20));
    let mib = |n: u64| n << 20;
    let took = |peak, resident, heap_growth| Passed {
        peak: mib(peak),
        resident: mib(resident),
        heap_growth: mib(heap_growth),
        updated: false,
    };
    let expected =
        |plan: &Plan, made, passed, loaded| plan.expected_process(mib(made), passed, loaded);
    let with_fragments = |n: u64| mib(n) + mib(n) / 40;
    // Two moments of 4 MiB each, twice; the residuals were filled in.
    let passed = took(500, 400, 0);
    assert_eq!(expected(&host, 100, passed, false), with_fragments(516));
    assert_eq!(expected(&host, 100, passed, true), with_fragments(500));
    // Residuals of 3 MiB at 0 and at 15 MiB lie in huge pages from 0 to 4 and from 14 to 18 of 30 MiB.
    let odd = made(false, 3 << 19);
    assert_eq!(
        expected(&odd, 100, passed, false),
        with_fragments(500 + 10 + 12)
    );
    assert_eq!(expected(&disk, 100, passed, false), with_fragments(532));
    assert_eq!(
        expected(&disk, 100, took(500, 400, 20), false),
        with_fragments(552)
    );
    // Making the state took more than the backward, of which only what is there now is known.
    assert_eq!(expected(&disk, 500, took(500, 400, 20), false), mib(500));
    assert_eq!(
        expected(&disk, 500, took(500, 490, 20), false),
        with_fragments(522)
    );
}

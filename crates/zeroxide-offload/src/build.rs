//! Units as they begin: their memory leased, their windows reserved, their blocks listed and the disk opened for them.

use zeroxide_layout::{BlockId, StateKey, StateLayout, StateTensor, Tiling};
use zeroxide_memory::{Bucket, Budget, Recorder, Window};
use zeroxide_plan::{PlacedUnit, Placement};
use zeroxide_storage::BlockSpec;

use crate::core::to_usize;
use crate::disk::Disk;
use crate::durable::mirror_tile;
use crate::error::{OffloadError, Result, misuse};
use crate::gradients::kept::{GRADIENT, KeptGradients};
use crate::homes::{GradArena, ShardArena, StateArena};
use crate::settings::{MeshPosition, Settings, StateHome, Transport, UnitSpec, WeightHome};
use crate::unit::{StateBlocks, Unit};
use crate::weights::Weights;
use crate::weights::residence::{Residence, UnitWeights};

/// Everything that the units' weights and state lie in: the units, what their weights share, and the disk where anything
/// is at home there, whose traffic `recorder` records. `tensors`: the state of each unit.
pub(crate) fn reserve(
    budget: &Budget,
    settings: &Settings,
    specs: &[UnitSpec],
    tensors: &[StateLayout],
    placement: &Placement,
    recorder: &Recorder,
) -> Result<(Vec<Unit>, Weights, Option<Disk>)> {
    let (units, blocks) = make_units(budget, settings, specs, tensors, placement)?;
    check_durable(settings, &units, placement)?;
    let weights = Weights::new(budget, placement, settings.gathered_bytes)?;
    let disk = match (placement.ring_tile(), placement.ring_minimum()) {
        (Some(tile), Some(need)) => Some(Disk::open(
            budget,
            settings,
            (tile, need),
            blocks,
            recorder,
        )?),
        _ => None,
    };
    Ok((units, weights, disk))
}

/// The units, and what they keep on disk.
fn make_units(
    budget: &Budget,
    settings: &Settings,
    specs: &[UnitSpec],
    tensors: &[StateLayout],
    placement: &Placement,
) -> Result<(Vec<Unit>, Vec<BlockSpec>)> {
    let grads = GradArena::new(budget, placement)?;
    let states = StateArena::new(budget, placement)?;
    let homes = ShardArena::new(budget, placement)?;
    let mut blocks = Vec::new();
    let mut units = Vec::with_capacity(specs.len());
    for (index, placed) in placement.units.iter().enumerate() {
        let (spec, local) = (&placed.shape, placed.local);
        let trainable = local.kept;
        let weights = make_weights(budget, settings, placed, &homes)?;
        let state = match spec.state {
            _ if trainable == 0 => StateBlocks::None,
            StateHome::Disk => StateBlocks::Disk { pristine: true },
            StateHome::Device => StateBlocks::Away,
            StateHome::Host => StateBlocks::Host {
                blocks: states.blocks(&tensors[index], trainable)?,
            },
        };
        let id = u32::try_from(index).map_err(|_| OffloadError::Misuse {
            call: "new",
            what: format!("{} units; at most {} are supported", specs.len(), u32::MAX),
        })?;
        check_streams(&specs[index])?;
        check_mesh(settings, &specs[index])?;
        blocks.extend(disk_blocks(&tensors[index], id, placed));
        if settings.durable.is_some() {
            blocks.extend(mirror_blocks(settings, &tensors[index], id, placed));
        }
        if placed.spills() {
            let size = settings.grad.size() as u64;
            blocks.push(BlockSpec {
                id: BlockId {
                    unit: id,
                    key: GRADIENT,
                },
                bytes: trainable * size,
                tile_bytes: placed.tile * size,
                committed: false,
            });
        }
        let grad = match spec.weights {
            WeightHome::Borrowed => KeptGradients::None,
            _ if trainable == 0 || placed.is_away() => KeptGradients::None,
            _ if placed.in_rooms() => KeptGradients::Missing,
            _ => KeptGradients::Host(grads.lease(trainable)?),
        };
        units.push(Unit {
            name: spec.name.clone(),
            mesh: MeshPosition {
                groups: placed.mesh,
                ..settings.mesh
            },
            base: local.base,
            weight_tiles: Tiling::new(local.own, placed.tile)?,
            state_tiles: Tiling::new(trainable, placed.tile)?,
            layout: placed.layout.clone(),
            rule: specs[index].optimizer.name(),
            tensors: tensors[index].clone(),
            weights,
            state,
            grad,
            outgoing: None,
            incoming: None,
            fresh: true,
            lazy: false,
            params: Unit::param_states(&spec.params, &specs[index].streams),
        });
    }
    Ok((units, blocks))
}

/// A format that rounds needs random bits for every parameter.
fn check_streams(spec: &UnitSpec) -> Result<()> {
    let (streams, params) = (spec.streams.len(), spec.params.len());
    if spec.format.is_exact() || streams == params {
        return Ok(());
    }
    misuse(
        "new",
        format!(
            "unit {} is {}, which rounds: {streams} streams of random bits for {params} parameters",
            spec.name, spec.format
        ),
    )
}

/// Shared memory is laid out for all ranks.
fn check_mesh(settings: &Settings, spec: &UnitSpec) -> Result<()> {
    if spec.mesh.is_none() || settings.mesh.transport == Transport::Collective {
        return Ok(());
    }
    let name = &spec.name;
    misuse(
        "new",
        format!("unit {name} is not trained by all ranks, and gradients go through shared memory"),
    )
}

/// What the unit keeps on disk.
fn disk_blocks(tensors: &StateLayout, unit: u32, placed: &PlacedUnit) -> Vec<BlockSpec> {
    let mut blocks = Vec::new();
    for tensor in tensors.tensors() {
        let elements = match tensor.key {
            StateKey::WEIGHT if placed.shape.weights == WeightHome::Disk => placed.local.own,
            StateKey::WEIGHT => continue,
            _ if placed.state_on_disk() => placed.local.kept,
            _ => continue,
        };
        blocks.push(block_spec(unit, tensor, elements, placed.tile));
    }
    blocks
}

/// A block of that many elements of a state tensor, in tiles of `tile`.
fn block_spec(unit: u32, tensor: &StateTensor, elements: u64, tile: u64) -> BlockSpec {
    let (tiles, rest) = (elements / tile, elements % tile);
    let tile_bytes = tensor.disk_bytes(tile);
    BlockSpec {
        id: BlockId {
            unit,
            key: tensor.key,
        },
        bytes: tiles * tile_bytes + tensor.disk_bytes(rest),
        tile_bytes,
        committed: true,
    }
}

/// What a durable store has beside that: room for copies of what is at home in host memory.
fn mirror_blocks(
    settings: &Settings,
    tensors: &StateLayout,
    unit: u32,
    placed: &PlacedUnit,
) -> Vec<BlockSpec> {
    let tile = mirror_tile(settings);
    let mut blocks = Vec::new();
    for tensor in tensors.tensors() {
        let elements = match (tensor.key, placed.shape.weights, placed.shape.state) {
            (StateKey::WEIGHT, WeightHome::Host | WeightHome::Shard, _) => placed.local.own,
            (StateKey::WEIGHT, ..) => 0,
            (_, _, StateHome::Host) => placed.local.kept,
            _ => 0,
        };
        if elements > 0 {
            blocks.push(block_spec(unit, tensor, elements, tile));
        }
    }
    blocks
}

/// Refuses a durable run whose state is not all within reach of a commit.
fn check_durable(settings: &Settings, units: &[Unit], placement: &Placement) -> Result<()> {
    if settings.durable.is_none() {
        return Ok(());
    }
    if settings.speculates {
        return misuse(
            "new",
            "a durable run has no place to spare for updates that may be taken back",
        );
    }
    let out_of_reach = |unit: &&Unit| {
        matches!(
            unit.weights,
            UnitWeights::Away { .. } | UnitWeights::Borrowed { .. }
        )
    };
    if let Some(unit) = units.iter().find(out_of_reach) {
        let name = &unit.name;
        return misuse(
            "new",
            format!("a durable run has unit {name} on the device"),
        );
    }
    if placement.ring_tile().is_none() {
        return misuse("new", "a durable run has nothing at home on disk");
    }
    Ok(())
}

/// The live weights of one unit, before anything is in them.
fn make_weights(
    budget: &Budget,
    settings: &Settings,
    placed: &PlacedUnit,
    homes: &ShardArena,
) -> Result<UnitWeights> {
    let bytes = to_usize(placed.weight_bytes(settings.compute));
    if placed.is_away() {
        let window = Window::reserve(bytes)?;
        return Ok(UnitWeights::Away { window });
    }
    Ok(match placed.shape.weights {
        WeightHome::Borrowed => UnitWeights::Borrowed { lent: None },
        WeightHome::Disk | WeightHome::Shard => UnitWeights::Moving {
            window: Window::reserve(bytes)?,
            residence: Residence::Away,
            covered: false,
            home: homes.lease(placed)?,
        },
        WeightHome::Host => {
            let mut window = Window::reserve(bytes)?;
            // Memory that ranks share is put under the window when they have found one another.
            if !settings.mesh.shares_weights() {
                window.make_home(budget, Bucket::Weights)?;
            }
            UnitWeights::Host {
                window,
                all_shards_valid: true,
            }
        }
    })
}

//! From what a user asks for to homes, ring, frames and bytes, or to one line that says what does not fit.

use zeroxide_layout::{PAGE, ParamShape, TILE_QUANTUM};

use crate::buckets::Buckets;
use crate::device::{self, DeviceBuckets, DeviceRequest};
use crate::error::{PlanError, Result};
use crate::home::{GradientHome, StateHome, Transport, WeightHome};
use crate::limits;
use crate::mesh::Mesh;
use crate::placement::{DEFAULT_STAGING_BYTES, DEFAULT_TILE_ELEMENTS, Dtypes, Placement};
use crate::quantisation::Quantisation;
use crate::unit::{PlacedUnit, StateBytes, UnitShape};

/// A unit whose homes are the plan's to choose.
#[derive(Clone, Debug)]
pub struct UnitRequest {
    /// Name for messages.
    pub name: String,
    /// Its parameters, in the caller's order.
    pub params: Vec<ParamShape>,
    /// It is held from its first use to the end of backward.
    pub held_through_backward: bool,
    /// Bytes of its optimizer state.
    pub state_bytes: StateBytes,
    /// Units that follow one another with the same number belong to the same modules and are used together.
    pub turn: u32,
    /// This rank among those that train it; `None` where these are all ranks.
    pub mesh: Option<Mesh>,
}

/// What a user and the machine say.
#[derive(Clone, Debug)]
pub struct PlanRequest {
    /// This rank among the others.
    pub mesh: Mesh,
    /// Stage of `ZeRO`, 0 to 3.
    pub stage: u8,
    /// What carries gradients between ranks.
    pub transport: Transport,
    /// Element types.
    pub dtypes: Dtypes,
    /// What travels as integers.
    pub quantisation: Quantisation,
    /// Weights are to be on disk.
    pub weights_on_disk: bool,
    /// Optimizer state is to be on disk.
    pub state_on_disk: bool,
    /// Where gradients are to wait for the step; `None` leaves it to the plan. With optimizer state in host memory they
    /// wait there, unless backward uses them up.
    pub gradients: Option<GradientHome>,
    /// Most bytes of it that stay in host memory all the same, in whole units.
    pub pinned: u64,
    /// The units, in the order in which forward uses them.
    pub units: Vec<UnitRequest>,
    /// Units that are sent for ahead of their use.
    pub prefetch: usize,
    /// Bytes of the live weights of a tile; `None` for the default.
    pub tile_bytes: Option<u64>,
    /// Bytes of the staging ring; `None` for the default.
    pub staging_bytes: Option<u64>,
    /// Most bytes of the whole process; `None` for no limit.
    pub limit: Option<u64>,
    /// Bytes that the process uses without the state.
    pub resident: u64,
    /// The device that computes; `None` where that is the host.
    pub device: Option<DeviceRequest>,
}

/// What was chosen.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Units, shards and the sizes that follow from homes.
    pub placement: Placement,
    /// The units in the order of their use: those of one turn together, without those held all through a pass.
    pub turns: Vec<Vec<usize>>,
    /// Stage of `ZeRO`, 0 to 3.
    pub stage: u8,
    /// Home of all weights.
    pub weights: WeightHome,
    /// Home of all optimizer state, but of units that are at home on the device, and of those that are pinned.
    pub state: StateHome,
    /// Home of all gradients of units whose optimizer state is on disk; of all units, where backward uses them up.
    pub gradients: GradientHome,
    /// Elements in a tile that touches the disk.
    pub tile_elements: u64,
    /// Bytes of the staging ring; 0 where nothing is on disk.
    pub staging_bytes: u64,
    /// Bytes of the frames for gathered units; 0 where no weights move.
    pub gathered_bytes: u64,
    /// Units that are sent for ahead of their use.
    pub prefetch: usize,
    /// Payload of every step in host memory, by bucket.
    pub buckets: Buckets,
    /// What a device that computes has; `None` where that is the host.
    pub device: Option<DeviceBuckets>,
    /// Most bytes of the whole process; `None` for no limit.
    pub limit: Option<u64>,
    /// Bytes that the process uses without the state.
    pub resident: u64,
}

/// One part in so many of a process is left for what the allocator cannot use again. Its heaps grow by a few per cent
/// in the first steps, when blocks of other steps lie in the way, and how far is chance: GPT-2 at 8 x 128 tokens was
/// seen to grow by 0 to 4.5 % beyond the first step.
pub const FRAGMENTS: u64 = 40;

/// Gradients of so many bytes wait in host memory wherever they fit: less than what a process takes that has imported
/// torch.
pub const GRADIENTS_IN_MEMORY: u64 = 192 << 20;
/// Of a budget, one part in so many is left to activations before gradients that are larger take it.
const ACTIVATIONS: u64 = 4;

/// What a first backward took, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// The process's peak of resident memory until now.
    pub peak: u64,
    /// What is resident now.
    pub resident: u64,
    /// What the allocator's heaps have grown by since forward ended.
    pub heap_growth: u64,
    /// Backward has updated: what an update writes was resident beside all else.
    pub updated: bool,
}

impl Plan {
    /// Chooses homes and sizes.
    ///
    /// # Errors
    /// Every [`PlanError`].
    pub fn new(request: PlanRequest) -> Result<Self> {
        limits::check(&request)?;
        let (weights, state) = homes(&request);
        let tile_elements = tile_elements(&request);
        let turns = turns(&request.units);
        let shapes = request.units.into_iter().map(|unit| UnitShape {
            name: unit.name,
            params: unit.params,
            held_through_backward: unit.held_through_backward,
            weights: match unit.mesh {
                // It keeps all of them: what it would gather is what it has.
                Some(mesh) if mesh.has_all() && weights == WeightHome::Shard => WeightHome::Host,
                _ => weights,
            },
            state,
            gradients: GradientHome::Host,
            state_bytes: unit.state_bytes,
            mesh: unit.mesh,
        });
        let mut placement = Placement::new(
            request.mesh,
            request.transport,
            request.dtypes,
            request.quantisation,
            tile_elements,
            shapes.collect(),
        )?;
        pin(&mut placement, request.pinned, tile_elements);
        let device = request
            .device
            .map(|device| device::place(&mut placement, device, request.prefetch))
            .transpose()?;
        let gathered_bytes = placement.held_at_once(request.prefetch);
        let budget = request.limit.map(|limit| (limit, request.resident));
        let wanted = request.gradients.unwrap_or_else(|| {
            gradient_home(&placement, request.staging_bytes, gathered_bytes, budget)
        });
        placement.move_gradients(wanted);
        let any = |holds: fn(&PlacedUnit) -> bool| placement.units.iter().any(holds);
        let gradients = match () {
            () if any(PlacedUnit::spills) => GradientHome::Disk,
            () if any(PlacedUnit::consumes) => GradientHome::Consumed,
            () => GradientHome::Host,
        };
        let staging_bytes = ring_bytes(&placement, request.staging_bytes)?;
        let made = Self {
            turns,
            stage: request.stage,
            weights,
            state,
            gradients,
            tile_elements,
            staging_bytes,
            gathered_bytes,
            prefetch: request.prefetch,
            buckets: placement.buckets(staging_bytes, gathered_bytes),
            device,
            limit: request.limit,
            resident: request.resident,
            placement,
        };
        made.check_budget()?;
        Ok(made)
    }

    /// Payload by bucket at the most: while the initial values are filled in, the staging ring has memory beside it, and
    /// so it has while a checkpoint is loaded.
    pub fn peak_buckets(&self, loaded: bool) -> Buckets {
        let (made, loading) = self.placement.filling_bytes();
        Buckets {
            staging: self.buckets.staging + if loaded { loading } else { made },
            ..self.buckets
        }
    }

    /// Most resident bytes of the process in all steps, told when a first backward has ended and nothing is updated yet,
    /// or all is.
    ///
    /// By then weights, gradients, frames and activations have been resident together as in every later step. What comes
    /// on top is payload that only an update writes: the staging ring, and state in host memory beyond the master weights,
    /// unless it was `loaded`. So does what the allocator's heaps grew by within the backward, most often after its peak:
    /// they keep that. The whole gets an allowance for [fragments](FRAGMENTS).
    ///
    /// `made` is the peak when training began. Where making the state took more than the backward, the present bytes stand
    /// for the backward's peak: freed memory is kept in the process.
    pub fn expected_process(&self, made: u64, passed: Passed, loaded: bool) -> u64 {
        let Passed {
            peak,
            resident,
            heap_growth,
            updated,
        } = passed;
        let reached = if peak > made {
            peak + heap_growth
        } else {
            resident
        };
        let state = if loaded || updated {
            0
        } else {
            self.placement.untouched_state_bytes()
        };
        let staging = if updated && peak > made {
            0
        } else {
            self.buckets.staging
        };
        let steady = reached + staging + state;
        peak.max(steady + steady / FRAGMENTS)
    }

    fn check_budget(&self) -> Result<()> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let (resident, buckets) = (self.resident, self.buckets);
        let need = resident + buckets.total();
        if need > limit {
            return Err(PlanError::OverBudget {
                need,
                limit,
                resident,
                buckets,
                pinned: self.state == StateHome::Disk,
            });
        }
        let filling = self.peak_buckets(false).staging - buckets.staging;
        let need = need + filling;
        if need > limit {
            return Err(PlanError::OverBudgetFilling {
                need,
                limit,
                resident,
                buckets,
                filling,
            });
        }
        Ok(())
    }
}

/// Where weights and state are at home. With stage 3 and no shared memory a rank keeps its shard of the weights; elsewhere
/// all weights that are not on disk are in host memory at all times.
fn homes(request: &PlanRequest) -> (WeightHome, StateHome) {
    let sharded = request.mesh.world() > 1
        && request.stage == 3
        && request.transport == Transport::Collective;
    let weights = match (request.weights_on_disk, sharded) {
        (true, _) => WeightHome::Disk,
        (false, true) => WeightHome::Shard,
        (false, false) => WeightHome::Host,
    };
    let state = if request.state_on_disk {
        StateHome::Disk
    } else {
        StateHome::Host
    };
    (weights, state)
}

/// Where gradients wait that may wait on disk: there when they are many, and with a `budget`, (limit, resident), when they
/// do not fit or leave activations too little. What the process takes does then not grow with the model.
fn gradient_home(
    placement: &Placement,
    staging: Option<u64>,
    gathered: u64,
    budget: Option<(u64, u64)>,
) -> GradientHome {
    let mesh = placement.mesh;
    let exchanged_where_kept =
        placement.transport == Transport::Collective && mesh.shards > 1 && mesh.replicas > 1;
    let bytes = placement.waiting_bytes();
    if exchanged_where_kept || bytes == 0 {
        return GradientHome::Host;
    }
    let total = |placement: &Placement| {
        let ring = ring_bytes(placement, staging).unwrap_or(0);
        placement.buckets(ring, gathered).total()
    };
    let mut spilled = placement.clone();
    spilled.spill_gradients();
    let need = total(placement);
    let many = bytes > GRADIENTS_IN_MEMORY;
    let leaves_too_little = match budget {
        None => many,
        Some((limit, resident)) if many => resident + need > limit - limit / ACTIVATIONS,
        Some((limit, resident)) => resident + need > limit,
    };
    if leaves_too_little && total(&spilled) < need {
        GradientHome::Disk
    } else {
        GradientHome::Host
    }
}

/// Gives units whose state is on disk a home for it in host memory, each that fits into `room` bytes, from the first that
/// forward uses on: an update within forward is waited for there first, and later ones have more compute beside them.
///
/// A step goes through all state once, in the same order each time: which units stay is for good, and a cache of those
/// used last would hold none of what comes next.
fn pin(placement: &mut Placement, mut room: u64, tile_elements: u64) {
    for unit in &mut placement.units {
        let bytes = unit.state_bytes();
        if unit.state_on_disk() && bytes <= room {
            room -= bytes;
            unit.shape.state = StateHome::Host;
            unit.choose_tile(tile_elements);
        }
    }
}

fn turns(units: &[UnitRequest]) -> Vec<Vec<usize>> {
    let others = (0..units.len()).filter(|index| !units[*index].held_through_backward);
    let mut found: Vec<Vec<usize>> = Vec::new();
    for index in others {
        match found.last_mut() {
            Some(last) if units[last[0]].turn == units[index].turn => last.push(index),
            _ => found.push(vec![index]),
        }
    }
    found
}

fn tile_elements(request: &PlanRequest) -> u64 {
    request.tile_bytes.map_or(DEFAULT_TILE_ELEMENTS, |bytes| {
        let elements = bytes / request.dtypes.compute.size() as u64;
        (elements / TILE_QUANTUM * TILE_QUANTUM).max(TILE_QUANTUM)
    })
}

/// Bytes of the ring: what was asked for, or enough for the tiles.
fn ring_bytes(placement: &Placement, asked: Option<u64>) -> Result<u64> {
    let (Some(tile), Some(need)) = (placement.ring_tile(), placement.ring_minimum()) else {
        return Ok(0);
    };
    let bytes = asked.unwrap_or_else(|| need.max(DEFAULT_STAGING_BYTES));
    if bytes < need {
        return Err(PlanError::Staging {
            need,
            limit: bytes,
            tile,
        });
    }
    Ok(bytes.next_multiple_of(PAGE as u64))
}

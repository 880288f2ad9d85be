//! The one object behind every call: units, memory, disk and threads, and how they come to be.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use zeroxide_layout::{BlockId, Dtype, StateKey, StateLayout, Tiling};
use zeroxide_memory::{Arena, Bucket, Budget, FRAME, FramePool, Window};
use zeroxide_optim::Pool;
use zeroxide_plan::{PlacedUnit, Placement};
use zeroxide_storage::{BlockSpec, BlockStore, Completion, Queue, StoreOptions, open_queue};

use crate::error::{OffloadError, Result, misuse};
use crate::gradients::transport::GradientTransport;
use crate::homes::{GradArena, ShardArena, StateArena, state_layouts};
use crate::io_report::{Stopwatch, Tally, Traffic};
use crate::settings::{MeshPosition, Settings, StateHome, UnitSpec, WeightHome};
use crate::state::fill::Fill;
use crate::state::read::CachedTile;
use crate::step::stream::ActiveStep;
use crate::unit::{StateBlocks, Unit};
use crate::weights::residence::{Residence, Weights};

/// The disk side: present when anything is at home there.
pub(crate) struct Disk {
    pub(crate) store: BlockStore,
    pub(crate) queue: Arc<dyn Queue>,
    /// Staging memory: every byte between disk and compute that is not a window.
    pub(crate) ring: Arena,
    pub(crate) arrivals: (Sender<Completion>, Receiver<Completion>),
}

pub(crate) struct Core {
    pub(crate) mesh: MeshPosition,
    /// How gradients reach the other ranks.
    pub(crate) transport: GradientTransport,
    pub(crate) comm_dtype: Dtype,
    pub(crate) reduce_scale: f32,
    pub(crate) units: Vec<Unit>,
    pub(crate) compute: Dtype,
    pub(crate) grad: Dtype,
    pub(crate) pool: Pool,
    pub(crate) budget: Budget,
    pub(crate) frames: Option<FramePool>,
    pub(crate) disk: Option<Disk>,
    pub(crate) clock: u64,
    pub(crate) steps: u64,
    pub(crate) poisoned: Option<(u64, String)>,
    /// A read of weights that were not there has got zeros.
    pub(crate) strayed: Option<String>,
    /// Units whose windows show zeros.
    pub(crate) blanked: Vec<usize>,
    pub(crate) fill: Option<Fill>,
    pub(crate) cache: Vec<CachedTile>,
    /// The step under way.
    pub(crate) step: Option<ActiveStep>,
    pub(crate) tiles_updated: Tally,
    /// Time in which compute stood still for the disk.
    pub(crate) waited: Stopwatch,
    /// Time that calls spent on steps, waiting included.
    pub(crate) updating: Stopwatch,
}

impl Core {
    pub(crate) fn new(settings: &Settings, specs: &[UnitSpec]) -> Result<Self> {
        let tensors = state_layouts(settings.compute, specs)?;
        let budget = Budget::new(settings.limit);
        let pool = Pool::new(settings.threads)?;
        let placement = settings.place_units(specs, &tensors)?;
        let grads = GradArena::new(&budget, &placement)?;
        let states = StateArena::new(&budget, &placement)?;
        let homes = ShardArena::new(&budget, &placement)?;
        let frames = frame_pool(&budget, &placement, settings.gathered_bytes)?;
        let mut blocks = Vec::new();
        let mut units = Vec::with_capacity(specs.len());
        for (index, placed) in placement.units.iter().enumerate() {
            let (spec, local) = (&placed.shape, placed.local);
            let trainable = local.kept;
            let weights = make_weights(&budget, settings, placed, &homes)?;
            let state = match spec.state {
                _ if trainable == 0 => StateBlocks::None,
                StateHome::Disk => StateBlocks::Disk { pristine: true },
                StateHome::Host => StateBlocks::Host {
                    blocks: states.blocks(&tensors[index], trainable)?,
                },
            };
            let id = u32::try_from(index).map_err(|_| OffloadError::Misuse {
                call: "new",
                what: format!("{} units; at most {} are supported", specs.len(), u32::MAX),
            })?;
            blocks.extend(disk_blocks(&tensors[index], id, placed));
            let grad = match spec.weights {
                WeightHome::Borrowed => None,
                _ if trainable == 0 => None,
                _ => Some(grads.lease(trainable)?),
            };
            units.push(Unit {
                name: spec.name.clone(),
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
                params: Unit::param_states(&spec.params),
            });
        }
        let disk = match (placement.ring_tile(), placement.ring_minimum()) {
            (Some(tile), Some(need)) => Some(Disk::open(&budget, settings, (tile, need), blocks)?),
            _ => None,
        };
        let transport = GradientTransport::new(&budget, settings, &placement)?;
        Ok(Self {
            mesh: settings.mesh,
            transport,
            comm_dtype: settings.comm_dtype,
            reduce_scale: settings.reduce_scale,
            units,
            compute: settings.compute,
            grad: settings.grad,
            pool,
            budget,
            frames,
            disk,
            clock: 0,
            steps: 0,
            poisoned: None,
            strayed: None,
            blanked: Vec::new(),
            fill: None,
            cache: Vec::new(),
            step: None,
            tiles_updated: Tally::default(),
            waited: Stopwatch::default(),
            updating: Stopwatch::default(),
        })
    }

    /// Where what the disk does is counted.
    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            queue: self.disk.as_ref().map(|disk| Arc::clone(&disk.queue)),
            waited: self.waited.clone(),
            updating: self.updating.clone(),
            tiles: self.tiles_updated.clone(),
        }
    }

    pub(crate) fn check_usable(&self) -> Result<()> {
        match &self.poisoned {
            Some((step, cause)) => Err(OffloadError::Poisoned {
                step: *step,
                cause: cause.clone(),
            }),
            None => self.check_strays(),
        }
    }

    pub(crate) fn check_unit(&self, call: &'static str, unit: usize) -> Result<()> {
        if unit < self.units.len() {
            return Ok(());
        }
        misuse(call, format!("unit {unit} of {}", self.units.len()))
    }

    pub(crate) fn check_param(&self, call: &'static str, unit: usize, param: usize) -> Result<()> {
        self.check_unit(call, unit)?;
        let count = self.units[unit].params.len();
        if param < count {
            return Ok(());
        }
        misuse(
            call,
            format!(
                "parameter {param} of {count} in unit {}",
                self.units[unit].name
            ),
        )
    }

    /// The disk side; only called for blocks whose home is the disk.
    pub(crate) fn disk(&self) -> &Disk {
        self.disk
            .as_ref()
            .expect("a block at home on disk implies a store")
    }
}

/// Receives one completion, adding the time spent waiting to `waited`.
pub(crate) fn receive(
    receiver: &Receiver<Completion>,
    waited: &mut Stopwatch,
) -> Result<Completion> {
    if let Ok(completion) = receiver.try_recv() {
        return Ok(completion);
    }
    let start = Instant::now();
    let completion = receiver.recv();
    *waited += start.elapsed();
    completion.map_err(|_| OffloadError::Misuse {
        call: "wait",
        what: "the I/O engine ended with work in flight".into(),
    })
}

/// Byte range of an element range.
pub(crate) fn byte_range(range: &std::ops::Range<u64>, element: usize) -> std::ops::Range<usize> {
    to_usize(range.start) * element..to_usize(range.end) * element
}

/// Element counts fit in memory, so they fit in `usize`.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("layouts are checked against the address space")
}

/// What the unit keeps on disk.
fn disk_blocks(tensors: &StateLayout, unit: u32, placed: &PlacedUnit) -> Vec<BlockSpec> {
    let mut blocks = Vec::new();
    for tensor in tensors.tensors() {
        let size = tensor.size() as u64;
        let elements = match tensor.key {
            StateKey::WEIGHT if placed.shape.weights == WeightHome::Disk => placed.local.own,
            StateKey::WEIGHT => continue,
            _ if placed.state_on_disk() => placed.local.kept,
            _ => continue,
        };
        blocks.push(BlockSpec {
            id: BlockId {
                unit,
                key: tensor.key,
            },
            bytes: elements * size,
            tile_bytes: placed.tile * size,
        });
    }
    blocks
}

fn make_weights(
    budget: &Budget,
    settings: &Settings,
    placed: &PlacedUnit,
    homes: &ShardArena,
) -> Result<Weights> {
    let bytes = to_usize(placed.weight_bytes(settings.compute));
    Ok(match placed.shape.weights {
        WeightHome::Borrowed => Weights::Borrowed { lent: None },
        WeightHome::Disk | WeightHome::Shard => Weights::Moving {
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
            Weights::Host {
                window,
                all_shards_valid: true,
            }
        }
    })
}

fn frame_pool(
    budget: &Budget,
    placement: &Placement,
    gathered_bytes: u64,
) -> Result<Option<FramePool>> {
    let Some((largest, need)) = placement.largest_moving() else {
        return Ok(None);
    };
    let capacity = placement.frame_bytes(gathered_bytes);
    if capacity < need {
        return Err(OffloadError::NoFrames {
            unit: largest.shape.name.clone(),
            need,
            held: 0,
            capacity,
        });
    }
    let frames = to_usize(capacity) / FRAME;
    Ok(Some(FramePool::new(budget, Bucket::Gathered, frames)?))
}

impl Disk {
    /// `tile` and `need`: bytes of one tile, and what the ring must have at least.
    fn open(
        budget: &Budget,
        settings: &Settings,
        (tile, need): (u64, u64),
        blocks: Vec<BlockSpec>,
    ) -> Result<Self> {
        if settings.staging_bytes < need {
            return misuse(
                "new",
                format!(
                    "the staging ring has {} bytes and needs {need}: two tiles of {tile}",
                    settings.staging_bytes
                ),
            );
        }
        let queue = open_queue(settings.engine.clone(), settings.queue_depth)?;
        let store = BlockStore::create(StoreOptions {
            directories: settings.directories.clone(),
            job: settings.job.clone(),
            blocks,
            queue: Arc::clone(&queue),
            ephemeral: true,
        })?;
        let ring = Arena::new(budget, Bucket::Staging, to_usize(settings.staging_bytes))?;
        Ok(Self {
            store,
            queue,
            ring,
            arrivals: channel(),
        })
    }
}

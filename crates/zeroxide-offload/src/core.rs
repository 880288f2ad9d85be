//! The one object behind every call: units, memory, disk and threads, and how they come to be.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use zeroxide_layout::{BlockId, Component, Dtype, StateLayout, Tiling, UnitLayout};
use zeroxide_memory::{Arena, Bucket, Budget, FRAME, FramePool, Window};
use zeroxide_optim::Pool;
use zeroxide_storage::{BlockSpec, BlockStore, Completion, Queue, StoreOptions, open_queue};

use crate::error::{OffloadError, Result, misuse};
use crate::gradients::transport::GradientTransport;
use crate::homes::{GradArena, LocalShard, ShardArena, StateArena, lay_out};
use crate::settings::{MeshPosition, Settings, StateHome, UnitSpec, WeightHome};
use crate::state::fill::Fill;
use crate::state::read::CachedTile;
use crate::step::stream::ActiveStep;
use crate::unit::{StateBlocks, Unit};
use crate::weights::residence::{Residence, Weights};

/// Tiles of units that never touch the disk are this many times longer: there is nothing to overlap with.
const HOST_TILE_FACTOR: u64 = 8;
/// Tiles of one unit that the staging ring must hold at least: one being updated, one moving.
const MIN_TILES_IN_RING: u64 = 2;

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
    pub(crate) state_layout: StateLayout,
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
    pub(crate) tiles_updated: u64,
    /// Time in which compute stood still for the disk.
    pub(crate) waited: Duration,
    /// Time that calls spent on steps, waiting included.
    pub(crate) updating: Duration,
}

impl Core {
    pub(crate) fn new(settings: &Settings, specs: &[UnitSpec]) -> Result<Self> {
        let state_layout = StateLayout::new(settings.compute, settings.format)?;
        let budget = Budget::new(settings.limit);
        let pool = Pool::new(settings.threads)?;
        let layouts = lay_out(settings.mesh, specs)?;
        let local_shards: Vec<LocalShard> = specs
            .iter()
            .zip(&layouts)
            .map(|(spec, layout)| LocalShard::new(settings.mesh, spec, layout))
            .collect();
        let grads = GradArena::new(&budget, settings.grad, specs, &local_shards)?;
        let states = StateArena::new(&budget, state_layout, specs, &local_shards)?;
        let homes = ShardArena::new(&budget, settings.compute, specs, &local_shards)?;
        let frames = frame_pool(&budget, settings, specs, &layouts)?;
        let mut blocks = Vec::new();
        let mut units = Vec::with_capacity(specs.len());
        for (index, ((spec, layout), local_shard)) in
            specs.iter().zip(layouts).zip(&local_shards).enumerate()
        {
            let trainable = local_shard.kept;
            let touches_disk = spec.weights == WeightHome::Disk
                || (spec.state == StateHome::Disk && trainable > 0);
            let tile = if touches_disk {
                settings.tile_elements
            } else {
                settings.tile_elements * HOST_TILE_FACTOR
            };
            let weights = make_weights(&budget, settings, spec, &layout, &homes, local_shard)?;
            let state = match spec.state {
                _ if trainable == 0 => StateBlocks::None,
                StateHome::Disk => StateBlocks::Disk {
                    moments_are_zero: true,
                },
                StateHome::Host => StateBlocks::Host {
                    blocks: states.blocks(trainable)?,
                },
            };
            let id = u32::try_from(index).map_err(|_| OffloadError::Misuse {
                call: "new",
                what: format!("{} units; at most {} are supported", specs.len(), u32::MAX),
            })?;
            blocks.extend(disk_blocks(
                state_layout,
                id,
                spec,
                &state,
                local_shard,
                tile,
            ));
            let grad = match spec.weights {
                WeightHome::Borrowed => None,
                _ if trainable == 0 => None,
                _ => Some(grads.lease(trainable)?),
            };
            units.push(Unit {
                name: spec.name.clone(),
                base: local_shard.base,
                weight_tiles: Tiling::new(local_shard.own, tile)?,
                state_tiles: Tiling::new(trainable, tile)?,
                layout,
                weights,
                state,
                grad,
                outgoing: None,
                incoming: None,
                fresh: true,
                params: Unit::param_states(&spec.params),
            });
        }
        let disk = if blocks.is_empty() {
            None
        } else {
            Some(Disk::open(&budget, settings, state_layout, blocks)?)
        };
        let transport = GradientTransport::new(&budget, settings, specs, &units)?;
        Ok(Self {
            mesh: settings.mesh,
            transport,
            comm_dtype: settings.comm_dtype,
            reduce_scale: settings.reduce_scale,
            units,
            state_layout,
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
            tiles_updated: 0,
            waited: Duration::ZERO,
            updating: Duration::ZERO,
        })
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

    /// Bytes of one element of a component.
    pub(crate) fn element_bytes(&self, component: Component) -> usize {
        element_bytes(self.state_layout, component)
    }
}

/// Bytes of one element of `component` in `layout`.
pub(crate) fn element_bytes(layout: StateLayout, component: Component) -> usize {
    layout.element_bytes(component).unwrap_or(0)
}

/// Receives one completion, adding the time spent waiting to `waited`.
pub(crate) fn receive(
    receiver: &Receiver<Completion>,
    waited: &mut Duration,
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
fn disk_blocks(
    layout: StateLayout,
    unit: u32,
    spec: &UnitSpec,
    state: &StateBlocks,
    local_shard: &LocalShard,
    tile: u64,
) -> Vec<BlockSpec> {
    let state_on_disk = matches!(state, StateBlocks::Disk { .. });
    let mut blocks = Vec::new();
    for (component, element) in layout.components() {
        let size = *element as u64;
        let elements = match component {
            Component::Weight if spec.weights == WeightHome::Disk => local_shard.own,
            Component::Weight => continue,
            _ if state_on_disk => local_shard.kept,
            _ => continue,
        };
        blocks.push(BlockSpec {
            id: BlockId {
                unit,
                component: *component,
            },
            bytes: elements * size,
            tile_bytes: tile * size,
        });
    }
    blocks
}

fn make_weights(
    budget: &Budget,
    settings: &Settings,
    spec: &UnitSpec,
    layout: &UnitLayout,
    homes: &ShardArena,
    local_shard: &LocalShard,
) -> Result<Weights> {
    let bytes = to_usize(layout.len()) * settings.compute.size();
    Ok(match spec.weights {
        WeightHome::Borrowed => Weights::Borrowed { lent: None },
        WeightHome::Disk | WeightHome::Shard => Weights::Moving {
            window: Window::reserve(bytes)?,
            residence: Residence::Away,
            covered: false,
            home: homes.lease(spec, local_shard)?,
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
    settings: &Settings,
    specs: &[UnitSpec],
    layouts: &[UnitLayout],
) -> Result<Option<FramePool>> {
    let largest = specs
        .iter()
        .zip(layouts)
        .filter(|(spec, _)| matches!(spec.weights, WeightHome::Disk | WeightHome::Shard))
        .map(|(spec, layout)| (to_usize(layout.len()) * settings.compute.size(), &spec.name))
        .max();
    let Some((largest, name)) = largest else {
        return Ok(None);
    };
    let frames = to_usize(settings.gathered_bytes).div_ceil(FRAME);
    if frames * FRAME < largest {
        return Err(OffloadError::NoFrames {
            unit: name.clone(),
            need: largest as u64,
            held: 0,
            capacity: (frames * FRAME) as u64,
        });
    }
    Ok(Some(FramePool::new(budget, Bucket::Gathered, frames)?))
}

impl Disk {
    fn open(
        budget: &Budget,
        settings: &Settings,
        layout: StateLayout,
        blocks: Vec<BlockSpec>,
    ) -> Result<Self> {
        let per_element: usize = layout.components().iter().map(|(_, bytes)| *bytes).sum();
        let longest = blocks
            .iter()
            .map(|block| to_usize(block.tile_bytes.min(block.bytes)))
            .max()
            .unwrap_or(0);
        let tile = (to_usize(settings.tile_elements) * per_element)
            .min(longest * layout.components().len());
        let need = tile as u64 * MIN_TILES_IN_RING;
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

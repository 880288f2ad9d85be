//! What the caller decides before the first byte is placed.

use std::path::PathBuf;

use zeroxide_layout::{Dtype, Format, ParamShape, StateLayout};
use zeroxide_optim::Optimizer;
use zeroxide_plan::{Dtypes, Mesh, Placement, StateBytes, UnitShape};
pub use zeroxide_plan::{StateHome, Transport, WeightHome};
use zeroxide_storage::EngineKind;

/// One unit, as the caller describes it.
#[derive(Clone, Debug)]
pub struct UnitSpec {
    /// Name for messages.
    pub name: String,
    /// Its gradients come all through backward, not one after the other within a short time.
    pub held_through_backward: bool,
    /// Its parameters, in the caller's order.
    pub params: Vec<ParamShape>,
    /// Home of the weights.
    pub weights: WeightHome,
    /// Home of the optimizer state.
    pub state: StateHome,
    /// The rule that updates it, with the hyperparameters that its state starts from.
    pub optimizer: Optimizer,
    /// How its optimizer state is stored.
    pub format: Format,
}

/// This process's place among those that train one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeshPosition {
    /// Number of this process, below `world`.
    pub rank: u32,
    /// Number of processes.
    pub world: u32,
    /// Every rank keeps all gradients and optimizer state (stage 0) instead of its shard of them.
    pub replicated: bool,
    /// How gradients travel. Of no meaning with one rank.
    pub transport: Transport,
}

impl MeshPosition {
    /// The only process.
    pub const ALONE: Self = Self {
        rank: 0,
        world: 1,
        replicated: false,
        transport: Transport::Collective,
    };

    /// The groups of ranks that hold a unit.
    pub(crate) fn groups(self) -> Mesh {
        let (shards, replicas) = if self.replicated {
            (1, self.world)
        } else {
            (self.world, 1)
        };
        Mesh {
            rank: self.rank,
            shards,
            replicas,
        }
    }

    /// Whether weights at home in host memory are one copy for all ranks.
    pub(crate) fn shares_weights(self) -> bool {
        self.world > 1 && self.transport == Transport::Shared && !self.replicated
    }
}

/// Everything else the core needs to know.
pub struct Settings {
    /// This process among the others.
    pub mesh: MeshPosition,
    /// Dtype in which gradients travel between ranks.
    pub comm_dtype: Dtype,
    /// What the sum over ranks is multiplied with; 1 / world for a mean.
    pub reduce_scale: f32,
    /// Hard limit of payload bytes; `None` for no limit.
    pub limit: Option<u64>,
    /// Compute threads.
    pub threads: usize,
    /// Dtype of the live weights.
    pub compute: Dtype,
    /// Dtype in which gradients are kept and accumulated.
    pub grad: Dtype,
    /// Elements in a tile, a multiple of 2048.
    pub tile_elements: u64,
    /// Bytes of the staging ring.
    pub staging_bytes: u64,
    /// Bytes of physical memory for units whose weights move.
    pub gathered_bytes: u64,
    /// The I/O engine.
    pub engine: EngineKind,
    /// Operations in flight at most.
    pub queue_depth: usize,
    /// Directories that share the disk traffic; empty when nothing is at home on disk.
    pub directories: Vec<PathBuf>,
    /// Name of this run's folder inside them.
    pub job: String,
}

impl Settings {
    /// Layouts, shards and sizes of the units.
    pub(crate) fn place_units(
        &self,
        specs: &[UnitSpec],
        tensors: &[StateLayout],
    ) -> zeroxide_plan::Result<Placement> {
        let shapes = specs.iter().zip(tensors).map(|(spec, tensors)| UnitShape {
            name: spec.name.clone(),
            params: spec.params.clone(),
            held_through_backward: spec.held_through_backward,
            weights: spec.weights,
            state: spec.state,
            state_bytes: StateBytes::of(tensors),
        });
        let dtypes = Dtypes {
            compute: self.compute,
            grad: self.grad,
            comm: self.comm_dtype,
        };
        let (mesh, transport) = (self.mesh.groups(), self.mesh.transport);
        Placement::new(
            mesh,
            transport,
            dtypes,
            self.tile_elements,
            shapes.collect(),
        )
    }
}

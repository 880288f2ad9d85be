//! What the caller decides before the first byte is placed.

use std::path::PathBuf;

use zeroxide_layout::{Dtype, Format, ParamShape, StateLayout};
use zeroxide_optim::Optimizer;
pub use zeroxide_plan::Mesh;
pub use zeroxide_plan::Quantisation;
use zeroxide_plan::{Dtypes, Placement, StateBytes, UnitShape};
pub use zeroxide_plan::{GradientHome, StateHome, Transport, WeightHome};
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
    /// Home of its gradients, where its optimizer state is on disk.
    pub gradients: GradientHome,
    /// The rule that updates it, with the hyperparameters that its state starts from.
    pub optimizer: Optimizer,
    /// How its optimizer state is stored.
    pub format: Format,
    /// The stream of random bits of each parameter, made of a seed and its name, for a format that rounds.
    pub streams: Vec<u64>,
    /// This process among those that train it; `None` where these are all. Only where the caller carries gradients.
    pub mesh: Option<Mesh>,
}

/// This process's position in the groups that a unit has, and how it reaches the other ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeshPosition {
    /// The shard group and the replicate group.
    pub groups: Mesh,
    /// How gradients travel. Of no meaning with one rank.
    pub transport: Transport,
}

impl MeshPosition {
    /// The only process.
    pub const ALONE: Self = Self {
        groups: Mesh::ALONE,
        transport: Transport::Collective,
    };

    /// Processes in all groups together: those whose gradients are summed.
    pub(crate) const fn world(self) -> u32 {
        self.groups.world()
    }

    /// Whether this rank keeps every element at home: nobody has to bring it a part.
    pub(crate) const fn has_all(self) -> bool {
        self.groups.has_all()
    }

    /// Which slice of every unit this rank answers for.
    pub(crate) const fn slice(self) -> u32 {
        self.groups.slice()
    }

    /// Whether weights at home in host memory are one copy for the ranks of a shard group.
    pub(crate) fn shares_weights(self) -> bool {
        !self.has_all() && self.transport == Transport::Shared
    }

    /// Whether this rank sums the gradients of its slice alone, and the caller brings those of the other replicas.
    ///
    /// Through shared memory, and where every rank keeps everything, each rank sums all that it keeps: there the bytes
    /// of all ranks are at hand, or come at once.
    pub(crate) fn sums_its_slice(self) -> bool {
        !self.has_all() && self.transport == Transport::Collective
    }
}

/// Everything else the core needs to know.
pub struct Settings {
    /// This process among the others.
    pub mesh: MeshPosition,
    /// Dtype in which gradients travel between ranks.
    pub comm_dtype: Dtype,
    /// What travels as integers, where the caller carries it.
    pub quantisation: Quantisation,
    /// What the sum over ranks is multiplied with; 1 / world for a mean.
    pub reduce_scale: f32,
    /// Whether a step may be under way after it was begun though nothing is at home on disk: nobody reads a weight that
    /// was not gathered.
    pub defers_steps: bool,
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
    /// How fast each directory's disk is beside the others, by which it gets its part; empty where they are alike.
    pub shares: Vec<u64>,
    /// Name of this run's folder inside them.
    pub job: String,
    /// Gives what is at home on disk a second place, for updates that may be taken back.
    pub speculates: bool,
    /// Makes what is on disk survive the process, and what is in host memory with it, at every commit: (name, value) of
    /// what a run must have in common with the one that it continues. `None` for a run that leaves nothing.
    pub durable: Option<Vec<(String, String)>>,
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
            gradients: spec.gradients,
            state_bytes: StateBytes::of(tensors),
            mesh: spec.mesh,
        });
        let dtypes = Dtypes {
            compute: self.compute,
            grad: self.grad,
            comm: self.comm_dtype,
        };
        let (mesh, transport) = (self.mesh.groups, self.mesh.transport);
        Placement::new(
            mesh,
            transport,
            dtypes,
            self.quantisation.clone(),
            self.tile_elements,
            shapes.collect(),
        )
    }
}

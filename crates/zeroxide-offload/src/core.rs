//! The one object behind every call: what is shared by all parts, and the parts.

use std::sync::Arc;

use zeroxide_layout::Dtype;
use zeroxide_memory::{Budget, Recorder};
use zeroxide_optim::Pool;

use crate::build;
use crate::disk::Disk;
use crate::durable::mirror_tile;
use crate::error::{Result, misuse};
use crate::gradients::Gradients;
use crate::gradients::spill::Spill;
use crate::gradients::transport::GradientTransport;
use crate::homes::state_layouts;
use crate::io_report::Traffic;
use crate::rooms::Rooms;
use crate::settings::{MeshPosition, Settings, UnitSpec};
use crate::state::State;
use crate::step::Step;
use crate::unit::Unit;
use crate::weights::Weights;

pub(crate) struct Core {
    pub(crate) mesh: MeshPosition,
    /// Dtype of the live weights.
    pub(crate) compute: Dtype,
    pub(crate) units: Vec<Unit>,
    pub(crate) pool: Pool,
    pub(crate) budget: Budget,
    pub(crate) recorder: Recorder,
    /// Present when anything is at home on disk.
    pub(crate) disk: Option<Disk>,
    pub(crate) weights: Weights,
    pub(crate) gradients: Gradients,
    pub(crate) rooms: Rooms,
    pub(crate) state: State,
    pub(crate) step: Step,
    /// Elements in a tile of what a commit copies from host memory to disk.
    pub(crate) mirror_tile: u64,
}

impl Core {
    pub(crate) fn new(settings: &Settings, specs: &[UnitSpec]) -> Result<Self> {
        let tensors = state_layouts(settings.compute, specs)?;
        let budget = Budget::new(settings.limit);
        let recorder = Recorder::default();
        let pool = Pool::new(settings.threads)?;
        let placement = settings.place_units(specs, &tensors)?;
        let (units, weights, disk) =
            build::reserve(&budget, settings, specs, &tensors, &placement, &recorder)?;
        let gradients = Gradients {
            transport: GradientTransport::new(&budget, settings, &placement)?,
            comm_dtype: settings.comm_dtype,
            reduce_scale: settings.reduce_scale,
            dtype: settings.grad,
            quantised: settings.quantisation.gradients,
            spill: Spill::new(&budget, &placement)?,
        };
        let rooms = Rooms::new(&budget, &placement)?;
        Ok(Self {
            mesh: settings.mesh,
            compute: settings.compute,
            units,
            pool,
            budget,
            recorder,
            disk,
            weights,
            gradients,
            rooms,
            state: State::default(),
            step: Step {
                deferred: settings.defers_steps,
                ..Step::default()
            },
            mirror_tile: mirror_tile(settings),
        })
    }

    /// Where what the disk does is counted; `None` where nothing is at home there.
    pub(crate) fn traffic(&self) -> Option<Traffic> {
        self.disk.as_ref().map(|disk| Traffic {
            queue: Arc::clone(&disk.queue),
            waited: disk.waited.clone(),
            updating: self.step.updating.clone(),
            tiles: self.step.tiles.clone(),
        })
    }

    /// Refuses every use of a state that is mixed, and of results that a reader of zeros has made.
    pub(crate) fn check_usable(&self) -> Result<()> {
        self.step.check_whole()?;
        self.weights.check_strays()
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

/// Byte range of an element range.
pub(crate) fn byte_range(range: &std::ops::Range<u64>, element: usize) -> std::ops::Range<usize> {
    to_usize(range.start) * element..to_usize(range.end) * element
}

/// Element counts fit in memory, so they fit in `usize`.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("layouts are checked against the address space")
}

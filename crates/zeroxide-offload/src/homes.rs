//! Host memory for the part of each unit that this rank keeps.

use zeroxide_layout::{Component, Dtype, StateLayout};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_plan::{PlacedUnit, Placement};

use crate::core::to_usize;
use crate::error::Result;
use crate::settings::WeightHome;

/// One mapping of `bytes`; none for no bytes.
fn arena(budget: &Budget, bucket: Bucket, bytes: u64) -> Result<Option<Arena>> {
    Ok(match to_usize(bytes) {
        0 => None,
        bytes => Some(Arena::new(budget, bucket, bytes)?),
    })
}

/// One mapping for the weights of all units whose shard is at home in host memory.
pub(crate) struct ShardArena {
    arena: Option<Arena>,
    compute: Dtype,
}

impl ShardArena {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        Ok(Self {
            arena: arena(budget, Bucket::Weights, placement.shard_bytes())?,
            compute: placement.dtypes.compute,
        })
    }

    pub(crate) fn lease(&self, unit: &PlacedUnit) -> Result<Option<Lease>> {
        match &self.arena {
            Some(arena) if unit.shape.weights == WeightHome::Shard => {
                let bytes = to_usize(unit.local.own) * self.compute.size();
                Ok(Some(arena.lease(bytes, zeroxide_layout::PAGE)?))
            }
            _ => Ok(None),
        }
    }
}

/// One mapping for all gradients.
pub(crate) struct GradArena {
    arena: Option<Arena>,
    dtype: Dtype,
}

impl GradArena {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        Ok(Self {
            arena: arena(budget, Bucket::Gradients, placement.gradient_bytes())?,
            dtype: placement.dtypes.grad,
        })
    }

    pub(crate) fn lease(&self, elements: u64) -> Result<Lease> {
        let arena = self.arena.as_ref().expect("sized from the same units");
        Ok(arena.lease(
            to_usize(elements) * self.dtype.size(),
            zeroxide_layout::PAGE,
        )?)
    }
}

/// One mapping for all optimizer state at home in host memory.
pub(crate) struct StateArena {
    arena: Option<Arena>,
    layout: StateLayout,
}

impl StateArena {
    pub(crate) fn new(budget: &Budget, layout: StateLayout, placement: &Placement) -> Result<Self> {
        Ok(Self {
            arena: arena(budget, Bucket::Optimizer, placement.optimizer_bytes())?,
            layout,
        })
    }

    fn state_components(layout: StateLayout) -> impl Iterator<Item = (Component, usize)> {
        layout
            .components()
            .iter()
            .copied()
            .filter(|(component, _)| *component != Component::Weight)
    }

    pub(crate) fn blocks(&self, elements: u64) -> Result<Vec<(Component, Lease)>> {
        let arena = self.arena.as_ref().expect("sized from the same units");
        Self::state_components(self.layout)
            .map(|(component, bytes)| {
                Ok((
                    component,
                    arena.lease(to_usize(elements) * bytes, zeroxide_layout::PAGE)?,
                ))
            })
            .collect()
    }
}

//! The part of each unit that this rank keeps, and the host memory for it.

use zeroxide_layout::{Component, Dtype, StateLayout, UnitLayout};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};

use crate::core::to_usize;
use crate::error::{Result, misuse};
use crate::settings::{MeshPosition, StateHome, UnitSpec, WeightHome};

/// Layouts over all ranks. With several ranks a unit is trainable or frozen as a whole, so that a shard of it is one
/// slice of each of its blocks.
pub(crate) fn lay_out(mesh: MeshPosition, specs: &[UnitSpec]) -> Result<Vec<UnitLayout>> {
    let mut layouts = Vec::with_capacity(specs.len());
    for spec in specs {
        let layout = UnitLayout::new(&spec.params, mesh.world)?;
        let trainable = layout.trainable_len();
        if mesh.world > 1 && trainable > 0 && trainable < layout.len() {
            return misuse(
                "new",
                format!(
                    "unit {} has trainable and frozen parameters; with several ranks they are units of their own",
                    spec.name
                ),
            );
        }
        layouts.push(layout);
    }
    Ok(layouts)
}

/// The part of a unit that this rank keeps, in elements.
pub(crate) struct LocalShard {
    /// Where it starts in the layout.
    pub(crate) base: u64,
    /// Weights.
    pub(crate) own: u64,
    /// Gradients and optimizer state.
    pub(crate) kept: u64,
}

impl LocalShard {
    pub(crate) fn new(mesh: MeshPosition, spec: &UnitSpec, layout: &UnitLayout) -> Self {
        if mesh.world == 1 || mesh.replicated || spec.weights == WeightHome::Borrowed {
            return Self {
                base: 0,
                own: layout.len(),
                kept: layout.trainable_len(),
            };
        }
        let shard = layout.shard(mesh.rank);
        let len = shard.end - shard.start;
        Self {
            base: shard.start,
            own: len,
            kept: if layout.trainable_len() > 0 { len } else { 0 },
        }
    }
}

/// One mapping for the weights of all units whose shard is at home in host memory.
pub(crate) struct ShardArena {
    arena: Option<Arena>,
    compute: Dtype,
}

impl ShardArena {
    pub(crate) fn new(
        budget: &Budget,
        compute: Dtype,
        specs: &[UnitSpec],
        local_shards: &[LocalShard],
    ) -> Result<Self> {
        let elements: u64 = specs
            .iter()
            .zip(local_shards)
            .filter(|(spec, _)| spec.weights == WeightHome::Shard)
            .map(|(_, local_shard)| local_shard.own)
            .sum();
        let bytes = to_usize(elements) * compute.size();
        let arena = if bytes == 0 {
            None
        } else {
            Some(Arena::new(budget, Bucket::Weights, bytes)?)
        };
        Ok(Self { arena, compute })
    }

    pub(crate) fn lease(&self, spec: &UnitSpec, local_shard: &LocalShard) -> Result<Option<Lease>> {
        match &self.arena {
            Some(arena) if spec.weights == WeightHome::Shard => {
                let bytes = to_usize(local_shard.own) * self.compute.size();
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
    pub(crate) fn new(
        budget: &Budget,
        dtype: Dtype,
        specs: &[UnitSpec],
        local_shards: &[LocalShard],
    ) -> Result<Self> {
        let elements: u64 = specs
            .iter()
            .zip(local_shards)
            .filter(|(spec, _)| spec.weights != WeightHome::Borrowed)
            .map(|(_, local_shard)| local_shard.kept)
            .sum();
        let bytes = to_usize(elements) * dtype.size();
        let arena = if bytes == 0 {
            None
        } else {
            Some(Arena::new(budget, Bucket::Gradients, bytes)?)
        };
        Ok(Self { arena, dtype })
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
    pub(crate) fn new(
        budget: &Budget,
        layout: StateLayout,
        specs: &[UnitSpec],
        local_shards: &[LocalShard],
    ) -> Result<Self> {
        let elements: u64 = specs
            .iter()
            .zip(local_shards)
            .filter(|(spec, _)| spec.state == StateHome::Host)
            .map(|(_, local_shard)| local_shard.kept)
            .sum();
        let bytes = to_usize(elements)
            * Self::state_components(layout)
                .map(|(_, bytes)| bytes)
                .sum::<usize>();
        let arena = if bytes == 0 {
            None
        } else {
            Some(Arena::new(budget, Bucket::Optimizer, bytes)?)
        };
        Ok(Self { arena, layout })
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

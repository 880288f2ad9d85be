//! Host memory for the part of each unit that this rank keeps.

use zeroxide_layout::{Dtype, StateKey, StateLayout, StateTensor};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};
use zeroxide_plan::{PlacedUnit, Placement};

use crate::core::to_usize;
use crate::error::Result;
use crate::settings::{UnitSpec, WeightHome};

/// One mapping of `bytes`; none for no bytes.
pub(crate) fn arena(budget: &Budget, bucket: Bucket, bytes: u64) -> Result<Option<Arena>> {
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

/// One mapping for all gradients at home in host memory.
pub(crate) struct GradArena {
    arena: Option<Arena>,
    dtype: Dtype,
}

impl GradArena {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        Ok(Self {
            arena: arena(budget, Bucket::Gradients, placement.waiting_bytes())?,
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

/// The state tensors of each unit.
pub(crate) fn state_layouts(compute: Dtype, specs: &[UnitSpec]) -> Result<Vec<StateLayout>> {
    specs
        .iter()
        .map(|spec| {
            let moments = spec.optimizer.moments();
            Ok(StateLayout::new(compute, spec.format, &moments)?)
        })
        .collect()
}

/// One mapping for all optimizer state at home in host memory.
pub(crate) struct StateArena(Option<Arena>);

impl StateArena {
    pub(crate) fn new(budget: &Budget, placement: &Placement) -> Result<Self> {
        let bytes = placement.optimizer_bytes();
        Ok(Self(arena(budget, Bucket::Optimizer, bytes)?))
    }

    /// The blocks of one unit, each with its initial values.
    pub(crate) fn blocks(
        &self,
        tensors: &StateLayout,
        elements: u64,
    ) -> Result<Vec<(StateKey, Lease)>> {
        let mut blocks = Vec::new();
        for tensor in tensors.state() {
            let arena = self.0.as_ref().expect("sized from the same units");
            let bytes = to_usize(tensor.bytes(elements));
            let mut lease = arena.lease(bytes, zeroxide_layout::PAGE)?;
            // Fresh memory reads as zero, and takes pages only when it is written.
            if tensor.initial != 0.0 {
                fill_initial(tensor, &mut lease);
            }
            blocks.push((tensor.key, lease));
        }
        Ok(blocks)
    }
}

/// Sets every element of a state tensor to its initial value.
pub(crate) fn fill_initial(tensor: &StateTensor, bytes: &mut [u8]) {
    if tensor.initial == 0.0 {
        bytes.fill(0);
    } else {
        bytemuck::cast_slice_mut(bytes).fill(tensor.initial);
    }
}

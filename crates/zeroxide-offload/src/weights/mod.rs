//! Live weights: where they are, how they come under their windows, and who reads them unannounced.

pub(crate) mod bringer;
mod cover;
pub(crate) mod gather;
pub(crate) mod residence;
mod rewrite;
pub(crate) mod stray;

use zeroxide_memory::{Bucket, Budget, FRAME, FramePool};
use zeroxide_plan::Placement;

use crate::core::to_usize;
use crate::error::{OffloadError, Result};

/// What all units' weights share: the memory that comes and goes under their windows, in which order they were used, and
/// what readers that nothing announced have met.
pub(crate) struct Weights {
    /// Memory for units whose weights move; `None` where none does.
    pub(crate) frames: Option<FramePool>,
    clock: u64,
    /// A read of weights that were not there has got zeros.
    pub(crate) strayed: Option<String>,
    /// Units whose windows show zeros.
    pub(crate) blanked: Vec<usize>,
}

impl Weights {
    pub(crate) fn new(budget: &Budget, placement: &Placement, gathered_bytes: u64) -> Result<Self> {
        Ok(Self {
            frames: frame_pool(budget, placement, gathered_bytes)?,
            clock: 0,
            strayed: None,
            blanked: Vec::new(),
        })
    }

    /// A later time than any before.
    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Refuses everything after a read that got zeros.
    pub(crate) fn check_strays(&self) -> Result<()> {
        match &self.strayed {
            Some(line) => Err(OffloadError::Strayed { line: line.clone() }),
            None => Ok(()),
        }
    }
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

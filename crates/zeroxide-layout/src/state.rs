//! The state tensors of a parameter: what an optimizer rule keeps of it, in a storage format, for a compute dtype.
//!
//! A [`StateLayout`] is a list. Whoever places, fills, reads, saves or updates state walks that list; no code elsewhere
//! knows which tensors a rule or a format has.

use std::fmt;
use std::ops::Range;

use crate::align::PAGE;
use crate::tiling::TILE_QUANTUM;
use crate::unit::PARAM_ALIGN;
use crate::{Dtype, Format, LayoutError};

/// Name of a state tensor, as messages, headers and checkpoints have it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StateKey(&'static str);

impl StateKey {
    /// The weight that forward and backward use, in the compute dtype.
    pub const WEIGHT: Self = Self("weight");
    /// The fp32 master weight beside a low-precision weight ([`Format::Fp32`]).
    pub const MASTER: Self = Self("master");
    /// The lower 16 bits of the master weight ([`Format::Split`]).
    pub const RESIDUAL: Self = Self("residual");

    /// The tensor of that name.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// The name.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for StateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Elements of a parameter that share a scale in [`StateDtype::Blocks`], and that are updated together where an update
/// rounds. Every parameter, shard and tile starts at a multiple of it, so that none of them cuts a block.
pub const STATE_BLOCK: usize = 64;
const _: () = assert!(
    PARAM_ALIGN == STATE_BLOCK as u64,
    "parameters start at a block"
);

/// Bytes of a block of [`StateDtype::Blocks`]: a bf16 scale, then a byte for each element.
pub const STATE_BLOCK_BYTES: usize = 2 + STATE_BLOCK;

/// Element type of a state tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum StateDtype {
    /// Numbers.
    Float(Dtype),
    /// The lower half of an fp32 value.
    Int16,
    /// The third byte of an fp32 value, below its bf16 half.
    Int8,
    /// 8-bit codes in blocks of [`STATE_BLOCK`] elements, each with a scale; of values of either sign, or of none below zero.
    Blocks {
        /// Whether values may be negative.
        signed: bool,
    },
}

impl StateDtype {
    /// The least that is stored by itself: (elements, bytes).
    const fn granule(self) -> (u64, u64) {
        match self {
            Self::Float(dtype) => (1, dtype.size() as u64),
            Self::Int16 => (1, 2),
            Self::Int8 => (1, 1),
            Self::Blocks { .. } => (STATE_BLOCK as u64, STATE_BLOCK_BYTES as u64),
        }
    }

    /// The name torch uses, without its `torch.` prefix, or words where torch has no such dtype.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float(dtype) => dtype.name(),
            Self::Int16 => "int16",
            Self::Int8 => "int8",
            Self::Blocks { signed: true } => "signed blocks of 8 bits",
            Self::Blocks { signed: false } => "unsigned blocks of 8 bits",
        }
    }
}

/// What a state tensor is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Role {
    /// The live weight.
    Live,
    /// What the format adds to the live weight, so that both together are the exact fp32 weight.
    Exact,
    /// What the rule remembers between updates.
    Moment,
}

/// One tensor of a rule's own, which the rule sees as fp32.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moment {
    /// Its name.
    pub key: StateKey,
    /// Whether its values may be negative.
    pub signed: bool,
    /// The value of every element before the first update.
    pub initial: f32,
}

/// One tensor of the state.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StateTensor {
    /// Its name.
    pub key: StateKey,
    /// Its element type.
    pub dtype: StateDtype,
    /// What it is for.
    pub role: Role,
    /// The value of every element before anything is written; 0 for weights.
    pub initial: f32,
}

impl StateTensor {
    const fn weight(key: StateKey, dtype: StateDtype, role: Role) -> Self {
        Self {
            key,
            dtype,
            role,
            initial: 0.0,
        }
    }

    /// Whether values may be negative: of all tensors but those that are kept as unsigned blocks.
    pub const fn is_signed(&self) -> bool {
        !matches!(self.dtype, StateDtype::Blocks { signed: false })
    }

    /// Bytes of that many elements from the start of a block on; the last block counts whole.
    pub const fn bytes(&self, elements: u64) -> u64 {
        let (block, bytes) = self.dtype.granule();
        elements.div_ceil(block) * bytes
    }

    /// The bytes that hold a range of elements, whole blocks at both ends.
    ///
    /// # Panics
    /// If they do not fit in memory.
    pub fn byte_range(&self, range: &Range<u64>) -> Range<usize> {
        let (block, bytes) = self.dtype.granule();
        let start = range.start / block * bytes;
        let end = range.end.div_ceil(block) * bytes;
        let fits = |at| usize::try_from(at).expect("layouts are checked against the address space");
        fits(start)..fits(end)
    }

    /// Bytes of a tile of that many elements on disk, where it takes whole pages.
    pub const fn disk_bytes(&self, elements: u64) -> u64 {
        self.bytes(elements).next_multiple_of(PAGE as u64)
    }

    /// Whether tiles of some lengths do not fill whole pages, so that what is left of the last one goes with them.
    pub const fn is_narrow(&self) -> bool {
        !self.bytes(TILE_QUANTUM).is_multiple_of(PAGE as u64)
    }
}

/// The state tensors of a parameter, the live weight first, then what makes it exact, then the rule's own in the order
/// in which the rule lists them.
#[derive(Clone, PartialEq, Debug)]
pub struct StateLayout {
    compute: Dtype,
    format: Format,
    tensors: Vec<StateTensor>,
}

impl StateLayout {
    /// Describes the state that a rule with these `moments` has in `format`, for weights of `compute`.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`] for any format but [`Format::Fp32`] with anything but bf16: only there is the
    /// weight a prefix of its master. [`LayoutError::Initial`] for a format that rounds and a moment that does not start
    /// at zero.
    pub fn new(compute: Dtype, format: Format, moments: &[Moment]) -> Result<Self, LayoutError> {
        let live = StateTensor::weight(StateKey::WEIGHT, StateDtype::Float(compute), Role::Live);
        let mut tensors = vec![live];
        match (format, compute) {
            (Format::Split | Format::SplitBf16 | Format::Compact, Dtype::F32 | Dtype::F16) => {
                return Err(LayoutError::Unsupported {
                    format,
                    dtype: compute,
                });
            }
            (Format::Split | Format::SplitBf16, Dtype::Bf16) => tensors.push(StateTensor::weight(
                StateKey::RESIDUAL,
                StateDtype::Int16,
                Role::Exact,
            )),
            (Format::Compact, Dtype::Bf16) => tensors.push(StateTensor::weight(
                StateKey::RESIDUAL,
                StateDtype::Int8,
                Role::Exact,
            )),
            // An fp32 weight is its own master.
            (Format::Fp32, Dtype::F32) => {}
            (Format::Fp32, Dtype::Bf16 | Dtype::F16) => tensors.push(StateTensor::weight(
                StateKey::MASTER,
                StateDtype::Float(Dtype::F32),
                Role::Exact,
            )),
        }
        for moment in moments {
            if !format.is_exact() && moment.initial != 0.0 {
                return Err(LayoutError::Initial {
                    format,
                    name: moment.key,
                });
            }
            tensors.push(StateTensor {
                key: moment.key,
                dtype: moment_dtype(format, moment.signed),
                role: Role::Moment,
                initial: moment.initial,
            });
        }
        Ok(Self {
            compute,
            format,
            tensors,
        })
    }

    /// Dtype of the live weight.
    pub const fn compute(&self) -> Dtype {
        self.compute
    }

    /// The storage format.
    pub const fn format(&self) -> Format {
        self.format
    }

    /// All tensors in order, the live weight first.
    pub fn tensors(&self) -> &[StateTensor] {
        &self.tensors
    }

    /// All tensors but the live weight: the optimizer state.
    pub fn state(&self) -> &[StateTensor] {
        &self.tensors[1..]
    }

    /// The tensor that makes the live weight exact; `None` where it is exact by itself.
    pub fn exact(&self) -> Option<&StateTensor> {
        self.tensors
            .get(1)
            .filter(|tensor| tensor.role == Role::Exact)
    }

    /// The rule's own tensors.
    pub fn moments(&self) -> impl Iterator<Item = &StateTensor> {
        self.tensors
            .iter()
            .filter(|tensor| tensor.role == Role::Moment)
    }

    /// The tensor called `name`, or `None` where the state has none of that name.
    pub fn find(&self, name: &str) -> Option<&StateTensor> {
        self.tensors.iter().find(|tensor| tensor.key.name() == name)
    }

    /// Bytes of all tensors for that many elements of a parameter, the live weight included and the gradient not.
    pub fn bytes(&self, elements: u64) -> u64 {
        self.tensors
            .iter()
            .map(|tensor| tensor.bytes(elements))
            .sum()
    }
}

/// What a rule's own tensor is kept as.
const fn moment_dtype(format: Format, signed: bool) -> StateDtype {
    match format {
        Format::Fp32 | Format::Split => StateDtype::Float(Dtype::F32),
        Format::SplitBf16 => StateDtype::Float(Dtype::Bf16),
        Format::Compact => StateDtype::Blocks { signed },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [Moment; 2] {
        [("exp_avg", true), ("exp_avg_sq", false)].map(|(name, signed)| Moment {
            key: StateKey::new(name),
            signed,
            initial: 0.0,
        })
    }

    /// Bytes of 64 elements: what the table of formats says, 64-fold. Catches: a tensor of another width, a scale that is
    /// not counted.
    #[test]
    fn bytes_are_those_of_the_format_table() {
        let bytes = |compute, format, count: usize| {
            StateLayout::new(compute, format, &two()[..count]).map(|layout| layout.bytes(64))
        };
        assert_eq!(bytes(Dtype::Bf16, Format::Split, 2), Ok(64 * 12));
        assert_eq!(bytes(Dtype::Bf16, Format::Fp32, 2), Ok(64 * 14));
        assert_eq!(bytes(Dtype::F16, Format::Fp32, 2), Ok(64 * 14));
        assert_eq!(bytes(Dtype::F32, Format::Fp32, 2), Ok(64 * 12));
        assert_eq!(bytes(Dtype::Bf16, Format::Split, 1), Ok(64 * 8));
        assert_eq!(bytes(Dtype::F32, Format::Fp32, 0), Ok(64 * 4));
        assert_eq!(bytes(Dtype::Bf16, Format::SplitBf16, 2), Ok(64 * 8));
        assert_eq!(bytes(Dtype::Bf16, Format::Compact, 2), Ok(64 * 5 + 4));
        assert_eq!(bytes(Dtype::Bf16, Format::Compact, 1), Ok(64 * 4 + 2));
    }

    /// Catches: a range that leaves out the block it ends in, and one that starts within a block.
    #[test]
    fn a_range_of_elements_is_whole_blocks() {
        let layout = StateLayout::new(Dtype::Bf16, Format::Compact, &two()).expect("bf16");
        let moment = layout.find("exp_avg").expect("listed");
        assert_eq!(moment.byte_range(&(64..128)), 66..132);
        assert_eq!(moment.byte_range(&(64..65)), 66..132);
        assert_eq!(moment.byte_range(&(63..65)), 0..132);
        assert_eq!(moment.byte_range(&(128..128)), 132..132);
        assert_eq!(moment.disk_bytes(2048), 4096);
        assert!(moment.is_narrow() && layout.tensors()[1].is_narrow());
        assert!(!layout.tensors()[0].is_narrow());
    }

    #[test]
    fn formats_that_round_refuse_to_start_from_anything_but_zero() {
        let sum = Moment {
            key: StateKey::new("sum"),
            signed: false,
            initial: 0.1,
        };
        for format in [Format::SplitBf16, Format::Compact] {
            let error = StateLayout::new(Dtype::Bf16, format, &[sum]).expect_err("it is rounded");
            let text = error.to_string();
            assert!(
                text.contains(format.name()) && text.contains("sum"),
                "{text}"
            );
        }
        StateLayout::new(Dtype::Bf16, Format::Split, &[sum]).expect("kept as it is");
    }

    #[test]
    fn tensors_come_live_exact_moments() {
        let names = |compute, format| {
            let layout = StateLayout::new(compute, format, &two()).expect("they go together");
            layout
                .tensors()
                .iter()
                .map(|tensor| (tensor.key.name(), tensor.dtype.name()))
                .collect::<Vec<_>>()
        };
        let moments = [("exp_avg", "float32"), ("exp_avg_sq", "float32")];
        assert_eq!(
            names(Dtype::Bf16, Format::Split),
            [
                ("weight", "bfloat16"),
                ("residual", "int16"),
                moments[0],
                moments[1]
            ]
        );
        assert_eq!(
            names(Dtype::F16, Format::Fp32),
            [
                ("weight", "float16"),
                ("master", "float32"),
                moments[0],
                moments[1]
            ]
        );
        assert_eq!(
            names(Dtype::F32, Format::Fp32),
            [("weight", "float32"), moments[0], moments[1]]
        );
    }

    #[test]
    fn an_initial_value_is_the_moments_own() {
        let sum = Moment {
            key: StateKey::new("sum"),
            signed: false,
            initial: 0.5,
        };
        let layout =
            StateLayout::new(Dtype::Bf16, Format::Split, &[sum]).expect("they go together");
        let initial: Vec<f32> = layout.tensors().iter().map(|each| each.initial).collect();
        assert_eq!(initial, [0.0, 0.0, 0.5]);
        assert_eq!(
            layout.exact().map(|each| each.key),
            Some(StateKey::RESIDUAL)
        );
        assert_eq!(layout.moments().count(), 1);
        assert!(layout.find("exp_avg").is_none());
    }

    #[test]
    fn a_format_without_its_bf16_names_both() {
        for format in [Format::Split, Format::SplitBf16, Format::Compact] {
            for dtype in [Dtype::F32, Dtype::F16] {
                let error = StateLayout::new(dtype, format, &[]).expect_err("it needs bf16");
                let text = error.to_string();
                assert!(
                    text.contains(format.name()) && text.contains(dtype.name()),
                    "{text}"
                );
            }
        }
    }
}

//! The state tensors of a parameter: what an optimizer rule keeps of it, in a storage format, for a compute dtype.
//!
//! A [`StateLayout`] is a list. Whoever places, fills, reads, saves or updates state walks that list; no code elsewhere
//! knows which tensors a rule or a format has.

use std::fmt;

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

/// Element type of a state tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum StateDtype {
    /// Numbers.
    Float(Dtype),
    /// The lower half of an fp32 value.
    Int16,
}

impl StateDtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::Int16 => 2,
        }
    }

    /// The name torch uses, without its `torch.` prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float(dtype) => dtype.name(),
            Self::Int16 => "int16",
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

/// One tensor of a rule's own, kept as fp32.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moment {
    /// Its name.
    pub key: StateKey,
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

    /// Bytes of one element.
    pub const fn size(&self) -> usize {
        self.dtype.size()
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
    /// [`LayoutError::Unsupported`] for [`Format::Split`] with anything but bf16: only there is the
    /// weight a prefix of its master.
    pub fn new(compute: Dtype, format: Format, moments: &[Moment]) -> Result<Self, LayoutError> {
        let live = StateTensor::weight(StateKey::WEIGHT, StateDtype::Float(compute), Role::Live);
        let mut tensors = vec![live];
        match (format, compute) {
            (Format::Split, Dtype::F32 | Dtype::F16) => {
                return Err(LayoutError::Unsupported {
                    format,
                    dtype: compute,
                });
            }
            (Format::Split, Dtype::Bf16) => tensors.push(StateTensor::weight(
                StateKey::RESIDUAL,
                StateDtype::Int16,
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
        tensors.extend(moments.iter().map(|moment| StateTensor {
            key: moment.key,
            dtype: StateDtype::Float(Dtype::F32),
            role: Role::Moment,
            initial: moment.initial,
        }));
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

    /// Bytes of one element of the tensor `key`, or `None` where the state has no such tensor.
    pub fn element_bytes(&self, key: StateKey) -> Option<usize> {
        self.find(key.name()).map(StateTensor::size)
    }

    /// Bytes of all tensors for one element of a parameter, the live weight included and the gradient not.
    pub fn bytes_per_element(&self) -> usize {
        self.tensors.iter().map(StateTensor::size).sum()
    }

    /// Bytes of the optimizer state for one element of a parameter: everything but the live weight.
    pub fn state_bytes_per_element(&self) -> usize {
        self.state().iter().map(StateTensor::size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [Moment; 2] {
        ["exp_avg", "exp_avg_sq"].map(|name| Moment {
            key: StateKey::new(name),
            initial: 0.0,
        })
    }

    #[test]
    fn bytes_per_element_are_those_of_the_format_table() {
        let bytes = |compute, format, count: usize| {
            StateLayout::new(compute, format, &two()[..count])
                .map(|layout| (layout.bytes_per_element(), layout.state_bytes_per_element()))
        };
        assert_eq!(bytes(Dtype::Bf16, Format::Split, 2), Ok((12, 10)));
        assert_eq!(bytes(Dtype::Bf16, Format::Fp32, 2), Ok((14, 12)));
        assert_eq!(bytes(Dtype::F16, Format::Fp32, 2), Ok((14, 12)));
        assert_eq!(bytes(Dtype::F32, Format::Fp32, 2), Ok((12, 8)));
        assert_eq!(bytes(Dtype::Bf16, Format::Split, 1), Ok((8, 6)));
        assert_eq!(bytes(Dtype::F32, Format::Fp32, 0), Ok((4, 0)));
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
    fn split_without_bf16_names_both() {
        for dtype in [Dtype::F32, Dtype::F16] {
            let error = StateLayout::new(dtype, Format::Split, &[]).expect_err("split needs bf16");
            let text = error.to_string();
            assert!(
                text.contains("split") && text.contains(dtype.name()),
                "{text}"
            );
        }
    }
}

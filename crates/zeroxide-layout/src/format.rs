//! Which components the optimizer state of a parameter consists of.

use std::fmt;

use crate::{Dtype, LayoutError};

/// Optimizer state format.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Format {
    /// An fp32 master weight, fp32 moments, and a low-precision copy of the weight where the compute
    /// dtype is not fp32.
    Fp32,
    /// The bf16 weight is the upper half of the fp32 master; a 16-bit residual holds the lower half.
    /// Carries the same bits as [`Format::Fp32`] in two bytes less per parameter.
    Split,
}

impl Format {
    /// The name used in configs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Split => "split",
        }
    }

    /// Reads a config name.
    ///
    /// # Errors
    /// [`LayoutError::UnknownFormat`] for any other text.
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        match text {
            "fp32" => Ok(Self::Fp32),
            "split" => Ok(Self::Split),
            _ => Err(LayoutError::UnknownFormat {
                text: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One part of a parameter's state; each part of a shard is one block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Component {
    /// The weight that forward and backward use, in the compute dtype.
    Weight,
    /// Lower 16 bits of the master weight ([`Format::Split`]).
    Residual,
    /// The fp32 master weight.
    Master,
    /// Exponential average of the gradient: the first moment.
    ExpAvg,
    /// Exponential average of the squared gradient: the second moment.
    ExpAvgSq,
}

impl Component {
    /// Every component, in the order blocks are laid out.
    pub const ALL: [Self; 5] = [
        Self::Weight,
        Self::Residual,
        Self::Master,
        Self::ExpAvg,
        Self::ExpAvgSq,
    ];

    /// The name used in messages, headers and checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Residual => "residual",
            Self::Master => "master",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A compute dtype and a state format that go together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct StateLayout {
    compute: Dtype,
    format: Format,
}

impl StateLayout {
    /// Pairs a compute dtype with a state format.
    ///
    /// # Errors
    /// [`LayoutError::Unsupported`] for [`Format::Split`] with anything but bf16: only there is the
    /// weight a prefix of its master.
    pub const fn new(compute: Dtype, format: Format) -> Result<Self, LayoutError> {
        match (format, compute) {
            (Format::Split, Dtype::F32 | Dtype::F16) => Err(LayoutError::Unsupported {
                format,
                dtype: compute,
            }),
            (Format::Split, Dtype::Bf16) | (Format::Fp32, _) => Ok(Self { compute, format }),
        }
    }

    /// Dtype of the live weight and of the gradient.
    pub const fn compute(self) -> Dtype {
        self.compute
    }

    /// The state format.
    pub const fn format(self) -> Format {
        self.format
    }

    /// The components of the state, the live weight included, each with the bytes of one element.
    ///
    /// With fp32 compute the weight is its own master.
    pub const fn components(self) -> &'static [(Component, usize)] {
        use Component::{ExpAvg, ExpAvgSq, Master, Residual, Weight};
        match (self.format, self.compute) {
            (Format::Split, _) => &[(Weight, 2), (Residual, 2), (ExpAvg, 4), (ExpAvgSq, 4)],
            (Format::Fp32, Dtype::F32) => &[(Weight, 4), (ExpAvg, 4), (ExpAvgSq, 4)],
            (Format::Fp32, Dtype::Bf16 | Dtype::F16) => {
                &[(Weight, 2), (Master, 4), (ExpAvg, 4), (ExpAvgSq, 4)]
            }
        }
    }

    /// Bytes of one element of `component`, or `None` where the state has no such component.
    pub fn element_bytes(self, component: Component) -> Option<usize> {
        self.components()
            .iter()
            .find(|(c, _)| *c == component)
            .map(|(_, bytes)| *bytes)
    }

    /// Bytes of state per parameter element, the live weight included and the gradient not.
    pub fn bytes_per_element(self) -> usize {
        self.components().iter().map(|(_, bytes)| bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_per_element_are_those_of_the_format_table() {
        let bytes =
            |compute, format| StateLayout::new(compute, format).map(StateLayout::bytes_per_element);
        assert_eq!(bytes(Dtype::Bf16, Format::Split), Ok(12));
        assert_eq!(bytes(Dtype::Bf16, Format::Fp32), Ok(14));
        assert_eq!(bytes(Dtype::F16, Format::Fp32), Ok(14));
        assert_eq!(bytes(Dtype::F32, Format::Fp32), Ok(12));
    }

    #[test]
    fn the_weight_has_the_size_of_the_compute_dtype() {
        for compute in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for format in [Format::Fp32, Format::Split] {
                if let Ok(layout) = StateLayout::new(compute, format) {
                    assert_eq!(
                        layout.element_bytes(Component::Weight),
                        Some(compute.size())
                    );
                }
            }
        }
    }

    #[test]
    fn split_without_bf16_names_both() {
        for dtype in [Dtype::F32, Dtype::F16] {
            let error = StateLayout::new(dtype, Format::Split).expect_err("split needs bf16");
            let text = error.to_string();
            assert!(
                text.contains("split") && text.contains(dtype.name()),
                "{text}"
            );
        }
    }

    #[test]
    fn format_names_parse_back() {
        for format in [Format::Fp32, Format::Split] {
            assert_eq!(Format::parse(format.name()), Ok(format));
        }
        assert!(Format::parse("fp16").is_err());
    }
}

//! How the weight of a parameter is stored beside its optimizer state.

use std::fmt;

use crate::LayoutError;

/// Storage format of a parameter's state. Which tensors it adds is in [`StateLayout`](crate::StateLayout).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Format {
    /// An fp32 master weight, and a low-precision copy of it where the compute dtype is not fp32.
    Fp32,
    /// The bf16 weight is the upper half of the fp32 master; a 16-bit residual holds the lower half.
    /// Carries the same bits as [`Format::Fp32`] in two bytes less per parameter.
    Split,
    /// The weight as in [`Format::Split`], and the rule's own tensors in bf16, rounded at random.
    SplitBf16,
    /// A bf16 weight with an 8-bit residual, which together are the upper 24 bits of the master, and 8-bit codes of the
    /// rule's own tensors with a scale a block; all rounded at random.
    Compact,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Fp32, Self::Split, Self::SplitBf16, Self::Compact];

    /// The name used in configs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Split => "split",
            Self::SplitBf16 => "split-bf16",
            Self::Compact => "compact",
        }
    }

    /// Whether an update has the bits of [`Format::Fp32`]. The others round, and need to know which elements they update.
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::Fp32 | Self::Split)
    }

    /// Reads a config name.
    ///
    /// # Errors
    /// [`LayoutError::UnknownFormat`] for any other text.
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| LayoutError::UnknownFormat {
                text: text.to_owned(),
            })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_names_parse_back() {
        for format in Format::ALL {
            assert_eq!(Format::parse(format.name()), Ok(format));
        }
        assert!(Format::parse("fp16").is_err());
    }
}

//! Element types of weights and gradients.

use std::fmt;

use crate::LayoutError;

/// Element type of a weight or gradient.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name torch uses, without its `torch.` prefix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Reads a long name (`float32`, with or without `torch.`) or a short one (`fp32`, `bf16`, `fp16`,
    /// `half`, `float`).
    ///
    /// # Errors
    /// [`LayoutError::UnknownDtype`] for any other text.
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        match text.strip_prefix("torch.").unwrap_or(text) {
            "float32" | "fp32" | "f32" | "float" => Ok(Self::F32),
            "bfloat16" | "bf16" => Ok(Self::Bf16),
            "float16" | "fp16" | "f16" | "half" => Ok(Self::F16),
            _ => Err(LayoutError::UnknownDtype {
                text: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            assert_eq!(Dtype::parse(dtype.name()), Ok(dtype));
            assert_eq!(Dtype::parse(&format!("torch.{}", dtype.name())), Ok(dtype));
        }
    }

    #[test]
    fn an_unknown_name_is_reported_as_written() {
        let error = Dtype::parse("torch.float64").expect_err("float64 is not a compute dtype");
        assert_eq!(
            error,
            LayoutError::UnknownDtype {
                text: "torch.float64".into()
            }
        );
        assert!(error.to_string().contains("torch.float64"), "{error}");
    }
}

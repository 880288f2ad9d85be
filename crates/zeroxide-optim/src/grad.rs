//! Gradients as the kernels take them.

/// Gradients of a tile, one per element.
#[derive(Clone, Copy, Debug)]
pub enum Grad<'a> {
    /// fp32.
    F32(&'a [f32]),
    /// bf16 bits.
    Bf16(&'a [u16]),
    /// fp16 bits.
    F16(&'a [u16]),
}

impl Grad<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) | Self::F16(values) => values.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

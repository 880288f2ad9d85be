//! Bytes of payload by what they are used for.

use std::fmt;

/// Bytes by bucket, counted as the budget counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// Weights that have their home in host memory.
    pub weights: u64,
    /// Gradients that wait for the optimizer step, and those on their way between ranks.
    pub gradients: u64,
    /// Optimizer state that has its home in host memory.
    pub optimizer: u64,
    /// The ring through which all disk traffic passes.
    pub staging: u64,
    /// Frames for gathered units.
    pub gathered: u64,
}

impl Buckets {
    /// Names and bytes, in the order in which reports list them.
    pub const fn each(&self) -> [(&'static str, u64); 5] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("staging", self.staging),
            ("gathered", self.gathered),
        ]
    }

    /// Bytes of all buckets.
    pub fn total(&self) -> u64 {
        self.each().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The name of the bucket with the most bytes; of several, the first.
    pub fn largest(&self) -> &'static str {
        let mut found = ("weights", 0);
        for (name, bytes) in self.each() {
            if bytes > found.1 {
                found = (name, bytes);
            }
        }
        found.0
    }
}

/// In MiB, buckets without a byte left out: `gradients 12, staging 32`.
impl fmt::Display for Buckets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (name, bytes) in self.each() {
            if bytes > 0 {
                write!(f, "{}{name} {}", if first { "" } else { ", " }, Mib(bytes))?;
                first = false;
            }
        }
        Ok(())
    }
}

/// Whole MiB, to the nearest.
pub(crate) struct Mib(pub(crate) u64);

impl fmt::Display for Mib {
    #[expect(
        clippy::cast_precision_loss,
        reason = "rounded to whole MiB for people"
    )]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0}", self.0 as f64 / f64::from(1 << 20))
    }
}

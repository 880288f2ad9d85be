//! Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2), with decoupled weight decay.
//!
//! With gradient `g`, weight `p` and momentum `m`:
//! ```text
//! c = beta1 m + (1 - beta1) g
//! p = p - lr (sign(c) + weight_decay p)
//! m = beta2 m + (1 - beta2) g
//! ```
//! The sign of zero is zero, and a NaN has none: it goes through to the weight.

use zeroxide_layout::Moment;

use super::{Hyperparameters, Rule, hyperparameters, nearest, signed};
use crate::convert::canonical;

hyperparameters! {
    /// Hyperparameters of Lion, named as in the paper's code and in `DeepSpeed`; the defaults of the paper's code.
    pub struct LionParams {
        /// Learning rate.
        lr: f64 in NonNegative = 1e-4,
        /// How much of the momentum is in the direction of the update, in `[0, 1)`.
        beta1: f64 in BelowOne = 0.9,
        /// Decay of the momentum, in `[0, 1)`.
        beta2: f64 in BelowOne = 0.99,
        /// The weight shrinks by `lr * weight_decay`.
        weight_decay: f64 in NonNegative = 0.0,
    }
}

impl Hyperparameters for LionParams {
    const NAME: &'static str = "lion";
    const TITLE: &'static str = "Lion";
    type Step = Constants;

    fn moments(&self) -> Vec<Moment> {
        vec![signed("exp_avg")]
    }

    fn prepare(&self, _step: u64, grad_scale: f64) -> Constants {
        Constants {
            direction_keep: nearest(self.beta1),
            direction_new: nearest((1.0 - self.beta1) * grad_scale),
            mean_keep: nearest(self.beta2),
            mean_new: nearest((1.0 - self.beta2) * grad_scale),
            minus_lr: nearest(-self.lr),
            shrink: nearest(-self.lr * self.weight_decay),
        }
    }
}

/// The constants of one step; the gradient's scale is part of those it is multiplied with.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Constants {
    direction_keep: f32,
    direction_new: f32,
    mean_keep: f32,
    mean_new: f32,
    minus_lr: f32,
    shrink: f32,
}

impl Rule for Constants {
    type First = f32;
    type Second = ();

    #[inline(always)]
    fn update(&self, weight: f32, (mean, ()): (f32, ()), gradient: f32) -> (f32, (f32, ())) {
        let direction = self
            .direction_keep
            .mul_add(mean, self.direction_new * gradient);
        let change = self.shrink.mul_add(weight, self.minus_lr * sign(direction));
        let mean = self.mean_keep.mul_add(mean, self.mean_new * gradient);
        (weight + change, (canonical(mean), ()))
    }
}

/// -1, 0 or 1; a NaN stays one.
#[inline(always)]
fn sign(x: f32) -> f32 {
    let one = 1.0_f32.copysign(x);
    let nonzero = if x == 0.0 { 0.0 } else { one };
    if x.is_nan() { x } else { nonzero }
}

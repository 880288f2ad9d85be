//! Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it.
//!
//! With gradient `g`, weight `p` and momentum buffer `b`:
//! ```text
//! g = scale g + weight_decay p
//! b = momentum b + g                     (the first update, whose b is 0)
//! b = momentum b + (1 - dampening) g     (every later one)
//! p = p - lr b                           or   p - lr (g + momentum b)   (Nesterov)
//! ```
//! Without momentum the buffer is what the last update used, and no later one looks at it.

use zeroxide_layout::Moment;

use super::{Fields, Hyperparameters, Rule, hyperparameters, nearest, signed};
use crate::convert::canonical;
use crate::error::OptimError;

hyperparameters! {
    /// Hyperparameters of SGD, named as in `torch.optim`; the defaults of `torch.optim.SGD`.
    pub struct SgdParams {
        /// Learning rate.
        lr: f64 in NonNegative = 1e-3,
        /// How much of the buffer an update keeps.
        momentum: f64 in NonNegative = 0.0,
        /// How much of the gradient does not enter the buffer.
        dampening: f64 in Finite = 0.0,
        /// `weight_decay * weight` is added to the gradient.
        weight_decay: f64 in NonNegative = 0.0,
        /// Whether the update looks one step ahead; needs a momentum and no dampening.
        nesterov: bool = false,
    }
}

impl Hyperparameters for SgdParams {
    const NAME: &'static str = "sgd";
    const TITLE: &'static str = "SGD";
    type Step = Constants;

    fn moments(&self) -> Vec<Moment> {
        vec![signed("momentum_buffer")]
    }

    fn validate(&self) -> Result<(), OptimError> {
        self.in_range()?;
        let wrong = |name, value, expected| {
            Err(OptimError::Hyperparameter {
                name,
                value,
                expected,
            })
        };
        if self.nesterov && self.momentum == 0.0 {
            return wrong("momentum", self.momentum, "a number above 0 with nesterov");
        }
        if self.nesterov && self.dampening != 0.0 {
            return wrong("dampening", self.dampening, "0 with nesterov");
        }
        Ok(())
    }

    fn prepare(&self, step: u64, grad_scale: f64) -> Constants {
        // As torch: without momentum there is no buffer, and so no dampening.
        let undamped = step == 1 || self.momentum == 0.0;
        Constants {
            grad_scale: nearest(grad_scale),
            weight_decay: nearest(self.weight_decay),
            keep: nearest(self.momentum),
            new: nearest(if undamped { 1.0 } else { 1.0 - self.dampening }),
            minus_lr_grad: nearest(if self.nesterov { -self.lr } else { 0.0 }),
            minus_lr_buffer: nearest(if self.nesterov {
                -self.lr * self.momentum
            } else {
                -self.lr
            }),
        }
    }
}

/// The constants of one step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Constants {
    grad_scale: f32,
    weight_decay: f32,
    keep: f32,
    new: f32,
    minus_lr_grad: f32,
    minus_lr_buffer: f32,
}

impl Rule for Constants {
    type First = f32;
    type Second = ();

    #[inline(always)]
    fn update(&self, weight: f32, (buffer, ()): (f32, ()), gradient: f32) -> (f32, (f32, ())) {
        let gradient = self
            .weight_decay
            .mul_add(weight, self.grad_scale * gradient);
        let buffer = self.keep.mul_add(buffer, self.new * gradient);
        // Both terms first: where the weight is much larger, only their sum may be rounded to it.
        let change = self
            .minus_lr_buffer
            .mul_add(buffer, self.minus_lr_grad * gradient);
        (weight + change, (canonical(buffer), ()))
    }
}

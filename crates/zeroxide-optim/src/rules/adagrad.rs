//! Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad` computes it.
//!
//! With gradient `g`, weight `p`, the sum of squares `s`, and `t` counted from 1:
//! ```text
//! g = scale g + weight_decay p
//! s = s + g^2
//! p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)
//! ```

use zeroxide_layout::{Moment, StateKey};

use super::{Hyperparameters, Range, Rule, check, nearest};
use crate::convert::canonical;
use crate::error::OptimError;

/// Hyperparameters of Adagrad, named as in `torch.optim`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdagradParams {
    /// Learning rate.
    pub lr: f64,
    /// By how much the learning rate falls with the number of updates.
    pub lr_decay: f64,
    /// `weight_decay * weight` is added to the gradient.
    pub weight_decay: f64,
    /// What the sum of squares starts from.
    pub initial_accumulator_value: f64,
    /// Added to the root of the sum of squares.
    pub eps: f64,
}

impl Default for AdagradParams {
    /// The defaults of `torch.optim.Adagrad`.
    fn default() -> Self {
        Self {
            lr: 1e-2,
            lr_decay: 0.0,
            weight_decay: 0.0,
            initial_accumulator_value: 0.0,
            eps: 1e-10,
        }
    }
}

impl Hyperparameters for AdagradParams {
    const NAME: &'static str = "adagrad";
    type Step = Constants;

    fn moments(&self) -> Vec<Moment> {
        vec![Moment {
            key: StateKey::new("sum"),
            initial: nearest(self.initial_accumulator_value),
        }]
    }

    fn validate(&self) -> Result<(), OptimError> {
        check(&[
            ("lr", self.lr, Range::NonNegative),
            ("lr_decay", self.lr_decay, Range::NonNegative),
            ("weight_decay", self.weight_decay, Range::NonNegative),
            (
                "initial_accumulator_value",
                self.initial_accumulator_value,
                Range::NonNegative,
            ),
            ("eps", self.eps, Range::Epsilon),
        ])
    }

    fn prepare(&self, step: u64, grad_scale: f64) -> Constants {
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 steps")]
        let before = (step - 1) as f64;
        Constants {
            grad_scale: nearest(grad_scale),
            weight_decay: nearest(self.weight_decay),
            eps: nearest(self.eps),
            minus_step: nearest(-self.lr / (1.0 + before * self.lr_decay)),
        }
    }
}

/// The constants of one step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Constants {
    grad_scale: f32,
    weight_decay: f32,
    eps: f32,
    minus_step: f32,
}

impl Rule for Constants {
    type First = f32;
    type Second = ();

    #[inline(always)]
    fn update(&self, weight: f32, (sum, ()): (f32, ()), gradient: f32) -> (f32, (f32, ())) {
        let gradient = self
            .weight_decay
            .mul_add(weight, self.grad_scale * gradient);
        let sum = gradient.mul_add(gradient, sum);
        let quotient = gradient / (sum.sqrt() + self.eps);
        (
            self.minus_step.mul_add(quotient, weight),
            (canonical(sum), ()),
        )
    }
}

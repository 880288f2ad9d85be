//! Adagrad (Duchi, Hazan and Singer 2011), as `torch.optim.Adagrad` computes it.
//!
//! With gradient `g`, weight `p`, the sum of squares `s`, and `t` counted from 1:
//! ```text
//! g = scale g + weight_decay p
//! s = s + g^2
//! p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)
//! ```

use zeroxide_layout::Moment;

use super::{Hyperparameters, Rule, hyperparameters, nearest, unsigned};
use crate::convert::canonical;

hyperparameters! {
    /// Hyperparameters of Adagrad, named as in `torch.optim`; the defaults of `torch.optim.Adagrad`.
    pub struct AdagradParams {
        /// Learning rate.
        lr: f64 in NonNegative = 1e-2,
        /// By how much the learning rate falls with the number of updates.
        lr_decay: f64 in NonNegative = 0.0,
        /// `weight_decay * weight` is added to the gradient.
        weight_decay: f64 in NonNegative = 0.0,
        /// What the sum of squares starts from.
        initial_accumulator_value: f64 in NonNegative = 0.0,
        /// Added to the root of the sum of squares.
        eps: f64 in Epsilon = 1e-10,
    }
}

impl Hyperparameters for AdagradParams {
    const NAME: &'static str = "adagrad";
    const TITLE: &'static str = "Adagrad";
    type Step = Constants;

    fn moments(&self) -> Vec<Moment> {
        vec![unsigned("sum", nearest(self.initial_accumulator_value))]
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

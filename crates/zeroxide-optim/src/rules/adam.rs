//! Adam and `AdamW`.
//!
//! The formula is that of `torch.optim.Adam` and `torch.optim.AdamW` (Kingma and Ba 2015, algorithm 1;
//! Loshchilov and Hutter 2019, algorithm 2). With gradient `g`, weight `p`, moments `m` and `v`:
//! ```text
//! g = scale g                      (AdamW)     or   scale g + weight_decay p   (Adam)
//! m = beta1 m + (1 - beta1) g
//! v = beta2 v + (1 - beta2) g^2
//! p = p - lr weight_decay p        (AdamW)
//! p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//! It is evaluated with `sqrt(1 - beta2^t)` moved from the root to the constants:
//! `step = lr sqrt(1 - beta2^t) / (1 - beta1^t)`, `eps' = eps sqrt(1 - beta2^t)`, and
//! `p = p - step (m / (sqrt(v) + eps'))`.
//!
//! [Note: compensation] Evaluated plainly in fp32, some ten roundings add up to several ulp of the update,
//! and to many more where the terms of `m` cancel. Here every value that matters is an unevaluated sum
//! `head + tail`: the head is what plain fp32 would have, the tail (fp32 too, and needed to a few bits only)
//! holds the head's own rounding error and the constants' error. Products get their tail from one fused
//! multiply-add (Dekker's product), sums from Knuth's two-sum, the root from its residual `v - s^2`, the
//! quotient from its remainder `m - q d`. Two roundings of the new weight are left, half an ulp each.

use zeroxide_layout::Moment;

use super::{Hyperparameters, Prepared, Rule, hyperparameters, signed, unsigned};
use crate::convert::{NAN_BITS, canonical};
use crate::kernel::Task;

hyperparameters! {
    /// Hyperparameters of Adam and `AdamW`, named as in `torch.optim`; the defaults of `torch.optim.AdamW`.
    pub struct AdamParams {
        /// Learning rate.
        lr: f64 in NonNegative = 1e-3,
        /// Decay of the first moment, in `[0, 1)`.
        beta1: f64 in BelowOne = 0.9,
        /// Decay of the second moment, in `[0, 1)`.
        beta2: f64 in BelowOne = 0.999,
        /// Added to the root of the second moment.
        eps: f64 in Epsilon = 1e-8,
        /// Weight decay coefficient.
        weight_decay: f64 in NonNegative = 1e-2,
        /// `true`: the weight shrinks by `lr * weight_decay` (`AdamW`); `false`: `weight_decay * weight` is added
        /// to the gradient (Adam).
        decoupled: bool = true,
        /// Whether the moments are divided by `1 - beta^step`, as torch always does.
        bias_correction: bool = true,
    }
}

impl Hyperparameters for AdamParams {
    const NAME: &'static str = "adam";
    const TITLE: &'static str = "Adam";
    type Step = AdamStep;

    fn moments(&self) -> Vec<Moment> {
        vec![signed("exp_avg"), unsigned("exp_avg_sq", 0.0)]
    }

    fn prepare(&self, step: u64, grad_scale: f64) -> AdamStep {
        let coupled = !self.decoupled && self.weight_decay != 0.0;
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 steps")]
        let t = step as f64;
        let (correction1, correction2) = if self.bias_correction {
            (1.0 - self.beta1.powf(t), 1.0 - self.beta2.powf(t))
        } else {
            (1.0, 1.0)
        };
        let shrink = if self.decoupled {
            self.lr * self.weight_decay
        } else {
            0.0
        };
        let merged_scale = if coupled { 1.0 } else { grad_scale };
        let constants = Constants {
            mean_keep: pair(self.beta1),
            mean_new: pair((1.0 - self.beta1) * merged_scale),
            square_keep: pair(self.beta2),
            root_new: pair((1.0 - self.beta2).sqrt() * merged_scale),
            eps: pair(self.eps * correction2.sqrt()),
            minus_step: pair(-self.lr * correction2.sqrt() / correction1),
            shrink: pair(-shrink).0,
            weight_decay: pair(self.weight_decay),
            grad_scale: pair(grad_scale),
        };
        AdamStep { constants, coupled }
    }
}

/// The constants of one step, computed in double precision and held as fp32 `(head, tail)` pairs whose sum
/// is the constant to about 48 bits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Constants {
    /// `beta1`.
    pub(crate) mean_keep: (f32, f32),
    /// `1 - beta1`, times the gradient scale unless coupled.
    pub(crate) mean_new: (f32, f32),
    /// `beta2`.
    pub(crate) square_keep: (f32, f32),
    /// `sqrt(1 - beta2)`, times the gradient scale unless coupled.
    pub(crate) root_new: (f32, f32),
    /// `eps sqrt(1 - beta2^t)`.
    pub(crate) eps: (f32, f32),
    /// `-lr sqrt(1 - beta2^t) / (1 - beta1^t)`.
    pub(crate) minus_step: (f32, f32),
    /// `-lr weight_decay`; zero if coupled.
    pub(crate) shrink: f32,
    /// `weight_decay`, for the coupled form.
    pub(crate) weight_decay: (f32, f32),
    /// What the gradient is multiplied by, for the coupled form.
    pub(crate) grad_scale: (f32, f32),
}

/// One step's worth of constants.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct AdamStep {
    constants: Constants,
    coupled: bool,
}

impl Prepared for AdamStep {
    fn run(&self, task: &mut Task<'_, '_, '_>) {
        if self.coupled {
            task.apply(&Adam::<true>(self.constants));
        } else {
            task.apply(&Adam::<false>(self.constants));
        }
    }
}

/// A constant as an fp32 value and what that leaves out.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
fn pair(constant: f64) -> (f32, f32) {
    let head = constant as f32;
    (head, (constant - f64::from(head)) as f32)
}

/// `COUPLED` adds the weight decay to the gradient (Adam) instead of shrinking the weight (`AdamW`).
#[derive(Clone, Copy, PartialEq, Debug)]
struct Adam<const COUPLED: bool>(Constants);

impl<const COUPLED: bool> Rule for Adam<COUPLED> {
    type First = f32;
    type Second = f32;

    #[inline(always)]
    fn update(&self, weight: f32, state: (f32, f32), gradient: f32) -> (f32, (f32, f32)) {
        update::<COUPLED>(&self.0, weight, state, gradient)
    }
}

/// An unevaluated sum; `tail` is much smaller than `head`.
#[derive(Clone, Copy)]
struct Pair {
    head: f32,
    tail: f32,
}

impl Pair {
    #[inline(always)]
    fn with_tail(self, tail: f32) -> Self {
        Self {
            head: self.head,
            tail,
        }
    }
}

/// `a + b` and the rounding error of that sum, exactly (Knuth 1969; any order of magnitudes).
#[inline(always)]
fn two_sum(a: f32, b: f32) -> Pair {
    let head = a + b;
    let b_part = head - a;
    let a_part = head - b_part;
    Pair {
        head,
        tail: (a - a_part) + (b - b_part),
    }
}

/// `constant * x`, where the constant is a pair.
#[inline(always)]
fn scaled(constant: (f32, f32), x: f32) -> Pair {
    let head = constant.0 * x;
    Pair {
        head,
        tail: constant.1.mul_add(x, constant.0.mul_add(x, -head)),
    }
}

/// [`canonical`] of a value that is not negative, in one integer operation: among the bit patterns that
/// arithmetic can yield, the canonical NaN is the smallest that lies above infinity.
#[inline(always)]
fn canonical_unsigned(x: f32) -> f32 {
    f32::from_bits(x.to_bits().min(NAN_BITS))
}

/// About `1 / (2 x)` for positive normal `x`, to an eighth: what a tail needs.
///
/// Subtracting from a constant negates the exponent and, roughly, mirrors the fraction.
#[inline(always)]
fn half_reciprocal(x: f32) -> f32 {
    f32::from_bits(0x7e73_11c7_u32.wrapping_sub(x.to_bits()))
}

/// One step of one element: the new weight, whose NaN has any payload, and the new moments.
#[inline(always)]
fn update<const COUPLED: bool>(
    c: &Constants,
    weight: f32,
    (exp_avg, exp_avg_sq): (f32, f32),
    gradient: f32,
) -> (f32, (f32, f32)) {
    // The gradient's share in both moments. Without coupling its scale is part of the constants.
    let (mean_term, root_term) = if COUPLED {
        let raw = scaled(c.grad_scale, gradient);
        let decay = scaled(c.weight_decay, weight);
        let sum = two_sum(raw.head, decay.head);
        // Where the terms cancel, the tail need no longer be small beside the head: make it so again.
        let sum = two_sum(sum.head, sum.tail + (raw.tail + decay.tail));
        let mean = scaled(c.mean_new, sum.head);
        let root = scaled(c.root_new, sum.head);
        (
            mean.with_tail(c.mean_new.0.mul_add(sum.tail, mean.tail)),
            root.with_tail(c.root_new.0.mul_add(sum.tail, root.tail)),
        )
    } else {
        (scaled(c.mean_new, gradient), scaled(c.root_new, gradient))
    };

    // m = beta1 m + mean_term. The terms may cancel: nothing less than a two-sum will do.
    let kept = scaled(c.mean_keep, exp_avg);
    let sum = two_sum(kept.head, mean_term.head);
    let mean = sum.with_tail(sum.tail + (kept.tail + mean_term.tail));

    // v = beta2 v + root_term^2. The terms have one sign: `kept - head` is exact where the old moment
    // dominates, and where the gradient does, its rounding error, halved by the root, can be borne.
    let kept = scaled(c.square_keep, exp_avg_sq);
    let head = root_term.head.mul_add(root_term.head, kept.head);
    let rest = root_term.head.mul_add(root_term.head, kept.head - head);
    let twice = root_term.head + root_term.head;
    let tail = rest + twice.mul_add(root_term.tail, kept.tail);
    // Where the head overflowed every tail is NaN: there the plain fp32 values stand alone. One integer
    // comparison serves both places; it runs beside the multiplications, a float comparison in their way.
    let finite = head.to_bits() < f32::INFINITY.to_bits();
    let square = Pair {
        head,
        tail: if finite { tail } else { 0.0 },
    };

    // d = sqrt(v) + eps', whose own rounding is left to the remainder below.
    let root = square.head.sqrt();
    let residual = (-root).mul_add(root, square.head) + square.tail;
    let denominator = Pair {
        head: root + c.eps.0,
        tail: residual.mul_add(half_reciprocal(root), c.eps.1),
    };

    // q = m / d. The denominator is zero, infinite or between 2^-75 and 2^65: its reciprocal is normal.
    // The remainder takes off `q sqrt(v)` first, then `q eps'`: next to exact while the root is the larger, and
    // half an ulp of the update away where eps' is. (Sorting the two takes that back for 3 % of the time.)
    let reciprocal = 1.0 / denominator.head;
    let quotient = mean.head * reciprocal;
    let remainder = (-quotient).mul_add(c.eps.0, (-quotient).mul_add(root, mean.head));
    let remainder = (-quotient).mul_add(denominator.tail, remainder + mean.tail);
    let tail = remainder * reciprocal;
    let quotient = Pair {
        head: quotient,
        tail: if finite { tail } else { 0.0 },
    };

    // p = p - lr weight_decay p - step q, small terms first
    let small = c.minus_step.0.mul_add(quotient.tail, c.shrink * weight);
    let small = c.minus_step.1.mul_add(quotient.head, small);
    (
        c.minus_step.0.mul_add(quotient.head, weight) + small,
        (
            canonical(mean.head + mean.tail),
            canonical_unsigned(square.head + square.tail),
        ),
    )
}

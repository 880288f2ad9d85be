//! The Adam arithmetic of one element.
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

use crate::adam::Constants;

/// The canonical quiet NaN, whose upper half is the canonical bf16 one.
const NAN_BITS: u32 = 0x7fc0_0000;

/// One element of state: weight, first moment, second moment.
#[derive(Clone, Copy)]
pub(crate) struct State {
    pub(crate) weight: f32,
    pub(crate) exp_avg: f32,
    pub(crate) exp_avg_sq: f32,
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

/// `x`, with every NaN made the canonical quiet one: which payload and sign survive an operation on two
/// NaNs is up to the compiler.
#[inline(always)]
pub(crate) fn canonical(x: f32) -> f32 {
    if x.is_nan() {
        f32::from_bits(NAN_BITS)
    } else {
        x
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

/// One step of one element. A weight that is NaN has any payload: whoever stores it makes that canonical, in fp32 by
/// [`canonical`] and in halves by the rounding. `COUPLED` adds the weight decay to the gradient (Adam) instead of shrinking
/// the weight (`AdamW`).
#[inline(always)]
pub(crate) fn update<const COUPLED: bool>(c: &Constants, state: State, gradient: f32) -> State {
    let State {
        weight,
        exp_avg,
        exp_avg_sq,
    } = state;

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
    State {
        weight: c.minus_step.0.mul_add(quotient.head, weight) + small,
        exp_avg: canonical(mean.head + mean.tail),
        exp_avg_sq: canonical_unsigned(square.head + square.tail),
    }
}

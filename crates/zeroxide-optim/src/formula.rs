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
//! It is evaluated with `sqrt(1 - beta2^t)` moved from the root to the constants, so that one division
//! remains: `step = lr sqrt(1 - beta2^t) / (1 - beta1^t)`, `eps' = eps sqrt(1 - beta2^t)`, and
//! `p = p - step m / (sqrt(v) + eps')`.
//!
//! [Note: compensation] Evaluated plainly in fp32, some ten roundings add up to several ulp of the update.
//! Here every intermediate value that matters is an unevaluated sum `head + tail`: the head is what plain
//! fp32 would have, the tail (fp32 too, and needed to a few bits only) holds the head's own rounding error
//! and the constants' error. Products get their tail from one fused multiply-add (Dekker's product), sums
//! from Knuth's two-sum, the root from its residual `v - s^2`, the quotient from its residual `n - q d`.
//! The result is rounded once or twice at the end. Tails become NaN where a head overflows; they are
//! dropped there, and the plain fp32 value remains.

use crate::adam::Constants;

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

/// `tail` where it is finite, else zero.
#[inline(always)]
fn finite_or_zero(tail: f32) -> f32 {
    if tail.abs() < f32::INFINITY {
        tail
    } else {
        0.0
    }
}

/// `x`, with every NaN made the canonical quiet one: which payload and sign survive an operation on two
/// NaNs is up to the compiler.
#[inline(always)]
fn canonical(x: f32) -> f32 {
    if x.is_nan() {
        f32::from_bits(0x7fc0_0000)
    } else {
        x
    }
}

/// About `1 / (2 x)` for positive normal `x`, to an eighth: what a tail needs.
///
/// Subtracting from a constant negates the exponent and, roughly, mirrors the fraction.
#[inline(always)]
fn half_reciprocal(x: f32) -> f32 {
    f32::from_bits(0x7e73_11c7_u32.wrapping_sub(x.to_bits()))
}

/// One step of one element. `COUPLED` adds the weight decay to the gradient (Adam) instead of shrinking
/// the weight (`AdamW`).
#[inline(always)]
pub(crate) fn update<const COUPLED: bool>(c: &Constants, state: State, gradient: f32) -> State {
    let State {
        weight,
        exp_avg,
        exp_avg_sq,
    } = state;

    // Terms of both moments that come from the gradient. Without coupling the gradient scale is part of
    // the constants.
    let (mean_term, root_term) = if COUPLED {
        let raw = scaled(c.grad_scale, gradient);
        let decay = scaled(c.weight_decay, weight);
        let sum = two_sum(raw.head, decay.head);
        let tail = sum.tail + (raw.tail + decay.tail);
        let mean = scaled(c.mean_new, sum.head);
        let root = scaled(c.root_new, sum.head);
        (
            Pair {
                head: mean.head,
                tail: c.mean_new.0.mul_add(tail, mean.tail),
            },
            Pair {
                head: root.head,
                tail: c.root_new.0.mul_add(tail, root.tail),
            },
        )
    } else {
        (scaled(c.mean_new, gradient), scaled(c.root_new, gradient))
    };

    // m = beta1 m + mean_term
    let kept = scaled(c.mean_keep, exp_avg);
    let sum = two_sum(kept.head, mean_term.head);
    let mean = Pair {
        head: sum.head,
        tail: finite_or_zero(sum.tail + (kept.tail + mean_term.tail)),
    };

    // v = beta2 v + root_term^2
    let square = root_term.head * root_term.head;
    let square_tail = (root_term.head + root_term.head).mul_add(
        root_term.tail,
        root_term.head.mul_add(root_term.head, -square),
    );
    let kept = scaled(c.square_keep, exp_avg_sq);
    let sum = two_sum(kept.head, square);
    let variance = Pair {
        head: sum.head,
        tail: finite_or_zero(sum.tail + (kept.tail + square_tail)),
    };

    // d = sqrt(v) + eps'
    let root = variance.head.sqrt();
    let residual = (-root).mul_add(root, variance.head) + variance.tail;
    let sum = two_sum(root, c.eps.0);
    let denominator = sum.head;
    let denominator_tail = residual.mul_add(half_reciprocal(root), sum.tail + c.eps.1);

    // q = step m / d. The denominator is zero, infinite or between 2^-75 and 2^65: its reciprocal is normal.
    let numerator = c.step.0 * mean.head;
    let numerator_tail = c.step.0.mul_add(
        mean.tail,
        c.step
            .1
            .mul_add(mean.head, c.step.0.mul_add(mean.head, -numerator)),
    );
    let reciprocal = 1.0 / denominator;
    let quotient = numerator * reciprocal;
    let residual = (-quotient).mul_add(denominator, numerator) + numerator_tail;
    let residual = (-quotient).mul_add(denominator_tail, residual);
    let quotient_tail = finite_or_zero(residual * reciprocal);

    // p = p - lr weight_decay p - q
    let small = if COUPLED {
        -quotient_tail
    } else {
        c.shrink.mul_add(weight, -quotient_tail)
    };
    State {
        weight: canonical((weight - quotient) + small),
        exp_avg: canonical(mean.head + mean.tail),
        exp_avg_sq: canonical(variance.head + variance.tail),
    }
}

//! Adam and `AdamW` over the two exact state formats.

use crate::convert::{Bf16, Element, F16, F32, bf16_half_up, f16_nearest_even};
use crate::error::OptimError;
use crate::formula::{State, canonical, update};
use crate::isa::{Isa, isa, per_isa};
use crate::split::{join, split, with_bf16, with_f16};

/// Hyperparameters of Adam and `AdamW`, named as in `torch.optim`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamParams {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the second moment, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay coefficient.
    pub weight_decay: f64,
    /// `true`: the weight shrinks by `lr * weight_decay` (`AdamW`); `false`: `weight_decay * weight` is added
    /// to the gradient (Adam).
    pub decoupled: bool,
    /// Whether the moments are divided by `1 - beta^step`, as torch always does.
    pub bias_correction: bool,
}

impl Default for AdamParams {
    /// The defaults of `torch.optim.AdamW`.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 1e-2,
            decoupled: true,
            bias_correction: true,
        }
    }
}

/// The smallest `eps` but zero: `eps sqrt(1 - beta2^t)`, whose root is 2^-27 at least, must have a reciprocal in fp32.
const MIN_EPS: f64 = 1e-30;

impl AdamParams {
    /// Checks every field against the range that torch accepts, but for values that fp32 cannot hold.
    pub fn validate(&self) -> Result<(), OptimError> {
        const BETA: &str = "a number in [0, 1)";
        const POSITIVE: &str = "a finite number that is not negative";
        const EPS: &str = "0, or a number from 1e-30 to 3e38";
        // The kernels hold every constant as fp32. An eps below that loses its reciprocal there.
        #[expect(clippy::cast_possible_truncation, reason = "overflow is looked for")]
        let non_negative = |value: f64| (value as f32).is_finite() && value >= 0.0;
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        for (name, value, allowed, expected) in [
            ("lr", self.lr, non_negative(self.lr), POSITIVE),
            ("beta1", self.beta1, below_one(self.beta1), BETA),
            ("beta2", self.beta2, below_one(self.beta2), BETA),
            (
                "eps",
                self.eps,
                non_negative(self.eps) && (self.eps == 0.0 || self.eps >= MIN_EPS),
                EPS,
            ),
            (
                "weight_decay",
                self.weight_decay,
                non_negative(self.weight_decay),
                POSITIVE,
            ),
        ] {
            if !allowed {
                return Err(OptimError::Hyperparameter {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// The constants of one step, computed in double precision and held as fp32 `(head, tail)` pairs whose sum
/// is the constant to about 48 bits. Names follow the formula in `formula.rs`.
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

/// One step's worth of precomputed constants; see [`AdamStep::new`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamStep {
    constants: Constants,
    coupled: bool,
}

impl AdamStep {
    /// Prepares step number `step`, counted from 1, as torch's `state["step"]` is after the update.
    ///
    /// `grad_scale` multiplies every gradient first: `1 / loss_scale`, times the clip factor.
    ///
    /// # Panics
    /// If `step` is zero.
    pub fn new(params: &AdamParams, step: u64, grad_scale: f64) -> Self {
        assert!(step >= 1, "steps are counted from 1");
        let coupled = !params.decoupled && params.weight_decay != 0.0;
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 steps")]
        let t = step as f64;
        let (correction1, correction2) = if params.bias_correction {
            (1.0 - params.beta1.powf(t), 1.0 - params.beta2.powf(t))
        } else {
            (1.0, 1.0)
        };
        let shrink = if params.decoupled {
            params.lr * params.weight_decay
        } else {
            0.0
        };
        let merged_scale = if coupled { 1.0 } else { grad_scale };
        let constants = Constants {
            mean_keep: pair(params.beta1),
            mean_new: pair((1.0 - params.beta1) * merged_scale),
            square_keep: pair(params.beta2),
            root_new: pair((1.0 - params.beta2).sqrt() * merged_scale),
            eps: pair(params.eps * correction2.sqrt()),
            minus_step: pair(-params.lr * correction2.sqrt() / correction1),
            shrink: pair(-shrink).0,
            weight_decay: pair(params.weight_decay),
            grad_scale: pair(grad_scale),
        };
        Self { constants, coupled }
    }
}

/// A constant as an fp32 value and what that leaves out.
#[expect(clippy::cast_possible_truncation, reason = "rounding is the purpose")]
fn pair(constant: f64) -> (f32, f32) {
    let head = constant as f32;
    (head, (constant - f64::from(head)) as f32)
}

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

/// The live low-precision weights of a tile: where the new ones go, and where a step notices that the old ones
/// are not the master's rounding any more, because somebody changed them.
#[derive(Debug)]
pub enum LowOut<'a> {
    /// Nowhere: the master is the weight.
    None,
    /// bf16 bits, rounded half-up (see [`bf16_half_up`]).
    Bf16(&'a mut [u16]),
    /// fp16 bits, rounded to nearest, ties to even.
    F16(&'a mut [u16]),
}

/// One Adam step over a tile in the `fp32` format, on the widest instruction set at hand.
///
/// All slices have one element per parameter, in the same order: `master` the fp32 weights, `exp_avg` and
/// `exp_avg_sq` the moments; all three are updated in place. `out` holds the low-precision weights and receives
/// the new ones; one that is not its master's rounding replaces the master first (see
/// [`with_bf16`](crate::with_bf16) and [`with_f16`](crate::with_f16)).
/// A NaN in any result is the canonical quiet NaN.
///
/// # Panics
/// If the slices differ in length.
pub fn step_fp32(
    step: &AdamStep,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
    out: LowOut<'_>,
) {
    step_fp32_with(isa(), step, master, exp_avg, exp_avg_sq, grad, out);
}

/// [`step_fp32`] on a given instruction set, with the same bits.
///
/// # Panics
/// If the slices differ in length, or the processor has no such instructions.
pub fn step_fp32_with(
    isa: Isa,
    step: &AdamStep,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
    out: LowOut<'_>,
) {
    macro_rules! with_out {
        ($coupled:literal, $grad:ty, $values:ident) => {
            match out {
                LowOut::None => {
                    fp32_kernel::<$coupled, $grad>(
                        isa,
                        &step.constants,
                        master,
                        exp_avg,
                        exp_avg_sq,
                        $values,
                    );
                }
                LowOut::Bf16(out) => fp32_low_kernel::<$coupled, $grad, HalfUp>(
                    isa,
                    &step.constants,
                    master,
                    exp_avg,
                    exp_avg_sq,
                    $values,
                    out,
                ),
                LowOut::F16(out) => fp32_low_kernel::<$coupled, $grad, NearestEvenF16>(
                    isa,
                    &step.constants,
                    master,
                    exp_avg,
                    exp_avg_sq,
                    $values,
                    out,
                ),
            }
        };
    }
    match (step.coupled, grad) {
        (false, Grad::F32(values)) => with_out!(false, F32, values),
        (false, Grad::Bf16(values)) => with_out!(false, Bf16, values),
        (false, Grad::F16(values)) => with_out!(false, F16, values),
        (true, Grad::F32(values)) => with_out!(true, F32, values),
        (true, Grad::Bf16(values)) => with_out!(true, Bf16, values),
        (true, Grad::F16(values)) => with_out!(true, F16, values),
    }
}

/// One Adam step over a tile in the `split` format, on the widest instruction set at hand.
///
/// `high` holds the bf16 weights and `low` their residuals (see [`split`](crate::split)); otherwise as
/// [`step_fp32`], and with the same bits: the master that the pair stands for, the moments, and the bf16
/// weight are those of the `fp32` format.
///
/// # Panics
/// If the slices differ in length.
pub fn step_split(
    step: &AdamStep,
    high: &mut [u16],
    low: &mut [u16],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
) {
    step_split_with(isa(), step, high, low, exp_avg, exp_avg_sq, grad);
}

/// [`step_split`] on a given instruction set, with the same bits.
///
/// # Panics
/// If the slices differ in length, or the processor has no such instructions.
pub fn step_split_with(
    isa: Isa,
    step: &AdamStep,
    high: &mut [u16],
    low: &mut [u16],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: Grad<'_>,
) {
    macro_rules! run {
        ($coupled:literal, $grad:ty, $values:ident) => {
            split_kernel::<$coupled, $grad>(
                isa,
                &step.constants,
                high,
                low,
                exp_avg,
                exp_avg_sq,
                $values,
            )
        };
    }
    match (step.coupled, grad) {
        (false, Grad::F32(values)) => run!(false, F32, values),
        (false, Grad::Bf16(values)) => run!(false, Bf16, values),
        (false, Grad::F16(values)) => run!(false, F16, values),
        (true, Grad::F32(values)) => run!(true, F32, values),
        (true, Grad::Bf16(values)) => run!(true, Bf16, values),
        (true, Grad::F16(values)) => run!(true, F16, values),
    }
}

/// How a live low-precision weight follows its master, and the master a live weight that was changed.
trait LowWeight {
    fn round(master: f32) -> u16;
    fn master(master: f32, live: u16) -> f32;
}

struct HalfUp;
impl LowWeight for HalfUp {
    #[inline(always)]
    fn round(master: f32) -> u16 {
        bf16_half_up(master)
    }
    #[inline(always)]
    fn master(master: f32, live: u16) -> f32 {
        with_bf16(master, live)
    }
}

struct NearestEvenF16;
impl LowWeight for NearestEvenF16 {
    #[inline(always)]
    fn round(master: f32) -> u16 {
        f16_nearest_even(master)
    }
    #[inline(always)]
    fn master(master: f32, live: u16) -> f32 {
        with_f16(master, live)
    }
}

per_isa! {
    fn fp32_kernel[const COUPLED: bool, G: Element][COUPLED, G](
        constants: &Constants, master: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32],
        grad: &[G::Bits],
    ) = fp32_loop::<COUPLED, G>(constants, master, exp_avg, exp_avg_sq, grad);
}

per_isa! {
    fn fp32_low_kernel[const COUPLED: bool, G: Element, L: LowWeight][COUPLED, G, L](
        constants: &Constants, master: &mut [f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32],
        grad: &[G::Bits], out: &mut [u16],
    ) = fp32_low_loop::<COUPLED, G, L>(constants, master, exp_avg, exp_avg_sq, grad, out);
}

per_isa! {
    fn split_kernel[const COUPLED: bool, G: Element][COUPLED, G](
        constants: &Constants, high: &mut [u16], low: &mut [u16], exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32], grad: &[G::Bits],
    ) = split_loop::<COUPLED, G>(constants, high, low, exp_avg, exp_avg_sq, grad);
}

#[inline(always)]
fn fp32_loop<const COUPLED: bool, G: Element>(
    constants: &Constants,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: &[G::Bits],
) {
    let len = master.len();
    assert_eq!(len, exp_avg.len(), "master and exp_avg differ in length");
    assert_eq!(
        len,
        exp_avg_sq.len(),
        "master and exp_avg_sq differ in length"
    );
    assert_eq!(len, grad.len(), "master and grad differ in length");
    for (((weight, exp_avg), exp_avg_sq), grad) in
        master.iter_mut().zip(exp_avg).zip(exp_avg_sq).zip(grad)
    {
        let state = State {
            weight: *weight,
            exp_avg: *exp_avg,
            exp_avg_sq: *exp_avg_sq,
        };
        let new = update::<COUPLED>(constants, state, G::load(*grad));
        (*weight, *exp_avg, *exp_avg_sq) = (canonical(new.weight), new.exp_avg, new.exp_avg_sq);
    }
}

#[inline(always)]
fn fp32_low_loop<const COUPLED: bool, G: Element, L: LowWeight>(
    constants: &Constants,
    master: &mut [f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: &[G::Bits],
    out: &mut [u16],
) {
    let len = master.len();
    assert_eq!(len, exp_avg.len(), "master and exp_avg differ in length");
    assert_eq!(
        len,
        exp_avg_sq.len(),
        "master and exp_avg_sq differ in length"
    );
    assert_eq!(len, grad.len(), "master and grad differ in length");
    assert_eq!(len, out.len(), "master and out differ in length");
    for ((((weight, exp_avg), exp_avg_sq), grad), out) in master
        .iter_mut()
        .zip(exp_avg)
        .zip(exp_avg_sq)
        .zip(grad)
        .zip(out)
    {
        let state = State {
            weight: L::master(*weight, *out),
            exp_avg: *exp_avg,
            exp_avg_sq: *exp_avg_sq,
        };
        let new = update::<COUPLED>(constants, state, G::load(*grad));
        (*weight, *exp_avg, *exp_avg_sq) = (canonical(new.weight), new.exp_avg, new.exp_avg_sq);
        *out = L::round(new.weight);
    }
}

#[inline(always)]
fn split_loop<const COUPLED: bool, G: Element>(
    constants: &Constants,
    high: &mut [u16],
    low: &mut [u16],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    grad: &[G::Bits],
) {
    let len = high.len();
    assert_eq!(len, low.len(), "high and low differ in length");
    assert_eq!(len, exp_avg.len(), "high and exp_avg differ in length");
    assert_eq!(
        len,
        exp_avg_sq.len(),
        "high and exp_avg_sq differ in length"
    );
    assert_eq!(len, grad.len(), "high and grad differ in length");
    for ((((high, low), exp_avg), exp_avg_sq), grad) in high
        .iter_mut()
        .zip(low)
        .zip(exp_avg)
        .zip(exp_avg_sq)
        .zip(grad)
    {
        let state = State {
            weight: join(*high, *low),
            exp_avg: *exp_avg,
            exp_avg_sq: *exp_avg_sq,
        };
        let new = update::<COUPLED>(constants, state, G::load(*grad));
        (*high, *low) = split(new.weight);
        (*exp_avg, *exp_avg_sq) = (new.exp_avg, new.exp_avg_sq);
    }
}

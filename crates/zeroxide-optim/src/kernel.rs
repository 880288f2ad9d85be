//! The update of a tile: every rule with every codec and every gradient dtype, compiled for each instruction set.

use zeroxide_layout::{Format, STATE_BLOCK, StateLayout, StateTensor};

use crate::codec::compact::Compact;
use crate::codec::moments::{Bf16Moments, Blocks, Moments, Remembered};
use crate::codec::split::Split;
use crate::codec::{Codec, with_codec};
use crate::convert::{Bf16, Element, F16, F32};
use crate::draw::Draw;
use crate::grad::Grad;
use crate::isa::{Isa, isa, per_isa};
use crate::rounding::{Rounding, rounding_kernel};
use crate::rules::{Rule, Step};
use crate::slot::Slot;

/// Updates a tile in place, on the widest instruction set at hand.
///
/// `tensors` are the bytes of the state tensors of `layout`, in its order, and `grad` the gradients; all have one element
/// per parameter. `layout` has the moments of the rule that `step` was prepared from. A live weight that is not what its
/// exact tensor says was changed by somebody, and counts. A NaN in any result is the canonical quiet NaN.
///
/// # Panics
/// If the tensors differ in length, or are not those that the layout lists.
pub fn update<'a>(
    step: &Step,
    layout: &StateLayout,
    tensors: impl IntoIterator<Item = &'a mut [u8]>,
    grad: Grad<'_>,
) {
    update_with(isa(), step, layout, tensors, grad);
}

/// [`update`] on a given instruction set, with the same bits.
///
/// # Panics
/// As there, or if the processor has no such instructions.
pub fn update_with<'a>(
    isa: Isa,
    step: &Step,
    layout: &StateLayout,
    tensors: impl IntoIterator<Item = &'a mut [u8]>,
    grad: Grad<'_>,
) {
    let format = layout.format();
    assert!(format.is_exact(), "{format} rounds: it needs a draw");
    update_drawn_with(isa, step, layout, tensors, grad, Draw::default());
}

/// [`update`] in any format. One that is not exact rounds by the bits of `draw`; its elements are all of one parameter, and
/// its tensors start at a block. The last block may have elements beyond the end of the parameter, which are zero and
/// stay so.
///
/// # Panics
/// As there, or if the draw starts within a block.
pub fn update_drawn<'a>(
    step: &Step,
    layout: &StateLayout,
    tensors: impl IntoIterator<Item = &'a mut [u8]>,
    grad: Grad<'_>,
    draw: Draw,
) {
    update_drawn_with(isa(), step, layout, tensors, grad, draw);
}

/// [`update_drawn`] on a given instruction set, with the same bits.
///
/// # Panics
/// As there, or if the processor has no such instructions.
pub fn update_drawn_with<'a>(
    isa: Isa,
    step: &Step,
    layout: &StateLayout,
    tensors: impl IntoIterator<Item = &'a mut [u8]>,
    grad: Grad<'_>,
    draw: Draw,
) {
    assert!(
        draw.first.is_multiple_of(STATE_BLOCK as u64),
        "element {} is within a block",
        draw.first
    );
    let mut tensors = tensors.into_iter();
    let mut task = Task {
        isa,
        layout,
        tensors: &mut tensors,
        grad,
        draw,
    };
    step.run(&mut task);
    assert!(
        tensors.next().is_none(),
        "more tensors than the rule and the format have"
    );
}

/// What a step is to be applied to.
pub(crate) struct Task<'t, 'a, 'g> {
    isa: Isa,
    layout: &'t StateLayout,
    tensors: &'t mut dyn Iterator<Item = &'a mut [u8]>,
    grad: Grad<'g>,
    draw: Draw,
}

impl Task<'_, '_, '_> {
    /// Applies a rule.
    pub(crate) fn apply<R: Rule>(&mut self, rule: &R) {
        match self.layout.format() {
            Format::SplitBf16 => self.apply_rounding::<R, Split, Bf16Moments>(rule),
            Format::Compact => self.apply_rounding::<R, Compact, Blocks>(rule),
            Format::Fp32 | Format::Split => {
                with_codec!(self.layout, C => self.apply_to::<R, C>(rule));
            }
        }
    }

    fn apply_rounding<R: Rule, C: Codec, M: Moments>(&mut self, rule: &R) {
        let len = self.grad.len();
        let live = C::Live::take(self.tensors, len);
        let exact = C::Exact::take(self.tensors, len);
        let mut signs = self.layout.moments().map(StateTensor::is_signed);
        let signed = [signs.next() == Some(true), signs.next() == Some(true)];
        let mut kept = |is_kept: bool| {
            let bytes = if is_kept { self.tensors.next() } else { None }.unwrap_or_default();
            let expected = if is_kept { M::bytes(len) } else { 0 };
            assert_eq!(bytes.len(), expected, "tensors differ in length");
            bytes
        };
        let (first, second) = (kept(R::First::IS_KEPT), kept(R::Second::IS_KEPT));
        let rounding = Rounding {
            rule,
            signed,
            draw: self.draw,
        };
        let isa = self.isa;
        match self.grad {
            Grad::F32(grad) => {
                rounding_kernel::<R, C, M, F32>(isa, &rounding, live, exact, first, second, grad);
            }
            Grad::Bf16(grad) => {
                rounding_kernel::<R, C, M, Bf16>(isa, &rounding, live, exact, first, second, grad);
            }
            Grad::F16(grad) => {
                rounding_kernel::<R, C, M, F16>(isa, &rounding, live, exact, first, second, grad);
            }
        }
    }

    fn apply_to<R: Rule, C: Codec>(&mut self, rule: &R) {
        let len = self.grad.len();
        let live = C::Live::take(self.tensors, len);
        let exact = C::Exact::take(self.tensors, len);
        let first = R::First::take(self.tensors, len);
        let second = R::Second::take(self.tensors, len);
        let isa = self.isa;
        match self.grad {
            Grad::F32(grad) => {
                kernel::<R, C, F32>(isa, rule, live, exact, first, second, grad);
            }
            Grad::Bf16(grad) => {
                kernel::<R, C, Bf16>(isa, rule, live, exact, first, second, grad);
            }
            Grad::F16(grad) => {
                kernel::<R, C, F16>(isa, rule, live, exact, first, second, grad);
            }
        }
    }
}

per_isa! {
    fn kernel[R: Rule, C: Codec, G: Element][R, C, G](
        rule: &R, live: &mut [C::Live], exact: &mut [C::Exact], first: &mut [R::First],
        second: &mut [R::Second], grad: &[G::Bits],
    ) = update_loop::<R, C, G>(rule, live, exact, first, second, grad);
}

#[inline(always)]
fn update_loop<R: Rule, C: Codec, G: Element>(
    rule: &R,
    live: &mut [C::Live],
    exact: &mut [C::Exact],
    first: &mut [R::First],
    second: &mut [R::Second],
    grad: &[G::Bits],
) {
    for ((((live, exact), first), second), grad) in
        live.iter_mut().zip(exact).zip(first).zip(second).zip(grad)
    {
        let weight = C::decode(*live, *exact);
        let (weight, state) = rule.update(weight, (*first, *second), G::load(*grad));
        (*live, *exact) = C::encode(weight);
        (*first, *second) = state;
    }
}

//! The update of a tile in a format that rounds: a block of 64 elements at a time, by the arithmetic of the exact formats,
//! whose results are then rounded at random.

use zeroxide_layout::STATE_BLOCK;

use crate::codec::Codec;
use crate::codec::carried::Carried;
use crate::codec::moments::{Moments, Remembered, Values, give_back, padded};
use crate::convert::Element;
use crate::draw::Draw;
use crate::isa::per_isa;
use crate::rules::Rule;

per_isa! {
    pub(crate) fn rounding_kernel[R: Rule, C: Codec, M: Moments, G: Element][R, C, M, G](
        rounding: &Rounding<'_, R>, live: &mut [C::Live], exact: &mut [C::Exact], first: &mut [u8], second: &mut [u8],
        grad: &[G::Bits],
    ) = rounding_loop::<R, C, M, G>(rounding, live, exact, first, second, grad);
}

/// What all elements of an update share.
pub(crate) struct Rounding<'a, R> {
    pub(crate) rule: &'a R,
    /// Whether values of the rule's first and second tensor may be negative.
    pub(crate) signed: [bool; 2],
    pub(crate) draw: Draw,
}

#[inline(always)]
fn rounding_loop<R: Rule, C: Codec, M: Moments, G: Element>(
    rounding: &Rounding<'_, R>,
    live: &mut [C::Live],
    exact: &mut [C::Exact],
    first: &mut [u8],
    second: &mut [u8],
    grad: &[G::Bits],
) {
    let Rounding { rule, signed, draw } = rounding;
    let whole = M::bytes(STATE_BLOCK);
    let mut firsts = first.chunks_mut(whole);
    let mut seconds = second.chunks_mut(whole);
    let weights = live
        .chunks_mut(STATE_BLOCK)
        .zip(exact.chunks_mut(STATE_BLOCK));
    for (block, ((live, exact), grad)) in weights.zip(grad.chunks(STATE_BLOCK)).enumerate() {
        let (first, second) = (
            firsts.next().unwrap_or_default(),
            seconds.next().unwrap_or_default(),
        );
        let words = draw.words(block);
        let (mut lives, mut exacts, grads) = (padded(live), padded(exact), padded(grad));
        let mut mean = load::<R::First, M>(first, signed[0]);
        let mut square = load::<R::Second, M>(second, signed[1]);
        let mut weight: Values = [0.0; STATE_BLOCK];
        for ((weight, live), exact) in weight.iter_mut().zip(&lives).zip(&exacts) {
            *weight = C::decode(*live, *exact);
        }
        for at in 0..STATE_BLOCK {
            let state = (R::First::carried(mean[at]), R::Second::carried(square[at]));
            let (after, state) = rule.update(weight[at], state, G::load(grads[at]));
            weight[at] = after;
            (mean[at], square[at]) = (state.0.carry(), state.1.carry());
        }
        let pairs = lives.iter_mut().zip(&mut exacts);
        for (((live, exact), weight), word) in pairs.zip(&weight).zip(&words) {
            (*live, *exact) = C::encode_drawn(*weight, *word);
        }
        give_back(&lives, live);
        give_back(&exacts, exact);
        if R::First::IS_KEPT {
            M::store(&mean, signed[0], &words, false, first);
        }
        if R::Second::IS_KEPT {
            M::store(&square, signed[1], &words, true, second);
        }
    }
}

#[inline(always)]
fn load<T: Remembered, M: Moments>(bytes: &[u8], signed: bool) -> Values {
    if T::IS_KEPT {
        M::load(bytes, signed)
    } else {
        [0.0; STATE_BLOCK]
    }
}

// Adam and AdamW with the bits of crates/zeroxide-optim/src/rules/adam.rs, whose note on compensation says why each
// value that matters is an unevaluated sum `head + tail`.
#include "zx/rounding.cuh"

namespace zx {

/// An unevaluated sum; the tail is much smaller than the head. Constants come as such pairs too.
struct Pair {
    float head;
    float tail;
};

/// The constants of one step, which all elements share.
struct AdamConstants {
    Pair mean_keep;
    Pair mean_new;
    Pair square_keep;
    Pair root_new;
    Pair eps;
    Pair minus_step;
    Pair weight_decay;
    Pair grad_scale;
    float shrink;
};

/// `a + b` and the rounding error of that sum, exactly (Knuth 1969).
__device__ inline Pair two_sum(float a, float b) {
    const float head = a + b;
    const float b_part = head - a;
    const float a_part = head - b_part;
    return {head, (a - a_part) + (b - b_part)};
}

/// `constant * x`, with its rounding error (Dekker 1971).
__device__ inline Pair scaled(Pair constant, float x) {
    const float head = constant.head * x;
    return {head, fmaf(constant.tail, x, fmaf(constant.head, x, -head))};
}

/// The canonical form of a value that is not negative: of the bits that arithmetic can yield, the canonical NaN's are
/// the smallest above infinity's.
__device__ inline float canonical_unsigned(float x) { return of_bits(least(bits_of(x), NAN_BITS)); }

/// About `1 / (2 x)` for positive normal `x`, to an eighth: what a tail needs.
__device__ inline float half_reciprocal(float x) { return of_bits(0x7e7311c7u - bits_of(x)); }

/// `COUPLED` adds the weight decay to the gradient (Adam) instead of shrinking the weight (AdamW).
template <bool COUPLED>
struct Adam {
    using First = float;
    static constexpr bool FIRST_IS_SIGNED = true;
    using Second = float;
    AdamConstants c;

    /// The gradient's share in both moments.
    __device__ void gradient_terms(float weight, float gradient, Pair &mean, Pair &root) const {
        if (!COUPLED) {
            mean = scaled(c.mean_new, gradient);
            root = scaled(c.root_new, gradient);
            return;
        }
        const Pair raw = scaled(c.grad_scale, gradient);
        const Pair decay = scaled(c.weight_decay, weight);
        Pair sum = two_sum(raw.head, decay.head);
        // Where the terms cancel, the tail need no longer be small beside the head: make it so again.
        sum = two_sum(sum.head, sum.tail + (raw.tail + decay.tail));
        mean = scaled(c.mean_new, sum.head);
        root = scaled(c.root_new, sum.head);
        mean.tail = fmaf(c.mean_new.head, sum.tail, mean.tail);
        root.tail = fmaf(c.root_new.head, sum.tail, root.tail);
    }

    __device__ float update(float weight, float &exp_avg, float &exp_avg_sq, float gradient) const {
        Pair mean_term, root_term;
        gradient_terms(weight, gradient, mean_term, root_term);

        Pair kept = scaled(c.mean_keep, exp_avg);
        Pair mean = two_sum(kept.head, mean_term.head);
        mean.tail = mean.tail + (kept.tail + mean_term.tail);

        kept = scaled(c.square_keep, exp_avg_sq);
        const float head = fmaf(root_term.head, root_term.head, kept.head);
        const float rest = fmaf(root_term.head, root_term.head, kept.head - head);
        const float twice = root_term.head + root_term.head;
        const float square_tail = rest + fmaf(twice, root_term.tail, kept.tail);
        // Where the head overflowed every tail is NaN: there the plain fp32 values stand alone.
        const bool finite = bits_of(head) < INFINITY_BITS;
        const Pair square = {head, finite ? square_tail : 0.0f};

        const float root = sqrtf(square.head);
        const float residual = fmaf(-root, root, square.head) + square.tail;
        const Pair denominator = {root + c.eps.head, fmaf(residual, half_reciprocal(root), c.eps.tail)};

        const float reciprocal = 1.0f / denominator.head;
        const float quotient = mean.head * reciprocal;
        float remainder = fmaf(-quotient, c.eps.head, fmaf(-quotient, root, mean.head));
        remainder = fmaf(-quotient, denominator.tail, remainder + mean.tail);
        const float quotient_tail = finite ? remainder * reciprocal : 0.0f;

        float small = fmaf(c.minus_step.head, quotient_tail, c.shrink * weight);
        small = fmaf(c.minus_step.tail, quotient, small);
        exp_avg = canonical(mean.head + mean.tail);
        exp_avg_sq = canonical_unsigned(square.head + square.tail);
        return fmaf(c.minus_step.head, quotient, weight) + small;
    }
};

}  // namespace zx

ZX_UPDATE(zx_adam, zx::Adam<true>)
ZX_ROUNDING(zx_adam, zx::Adam<true>)
ZX_UPDATE(zx_adamw, zx::Adam<false>)
ZX_ROUNDING(zx_adamw, zx::Adam<false>)

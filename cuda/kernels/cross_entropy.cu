// Cross-entropy over a vocabulary that comes in chunks of columns, so that all logits need not be there at once.
// Forward keeps for each row the largest logit so far, the sum of exp(logit - largest), and the target's logit;
// backward turns logits into their gradients, given the first two.
//
// The order of sums is fixed by the width of a chunk and the number of lanes. exp is the GPU's or the host's: the bits
// of the two are not the same.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 ENTROPY_THREADS = 256;
constexpr u32 WARPS = ENTROPY_THREADS / WARP;
constexpr int EACH = 8;

struct EntropyArgs {
    const void *logits;
    const i64 *targets;
    float *largest;
    float *sum;
    float *target_logit;
    i64 rows;
    i64 width;
    /// The first column of the chunk, counted in the vocabulary.
    i64 first;
};

struct EntropyGradientArgs {
    const void *logits;
    void *gradients;
    const i64 *targets;
    const float *largest;
    const float *sum;
    /// What each row's loss counts; 0 for a row that does not.
    const float *scale;
    i64 rows;
    i64 width;
    i64 first;
};

/// exp(x) summed as `sum * exp(largest)`.
struct Exponentials {
    float largest;
    float sum;
};

__device__ inline float minus_infinity() { return of_bits(0xff800000u); }

/// What exponents are taken relative to: where all is minus infinity so far, 0, so that no difference is a NaN.
__device__ inline float base_of(float largest) { return largest == minus_infinity() ? 0.0f : largest; }

__device__ inline Exponentials merged(Exponentials a, Exponentials b) {
    const float largest = fmaxf(a.largest, b.largest);
    const float base = base_of(largest);
    return {largest, a.sum * expf(a.largest - base) + b.sum * expf(b.largest - base)};
}

template <class E>
__device__ inline bool chunk_is_aligned(const void *logits, i64 width) {
    return is_aligned<typename E::Bits, EACH>(logits) && width % EACH == 0;
}

/// What a lane's logits of a row come to.
template <class E>
__device__ Exponentials sum_of_lane(const typename E::Bits *row, i64 width, bool wide) {
    Exponentials total = {minus_infinity(), 0.0f};
    for (i64 at = threadIdx.x * EACH; at < width; at += ENTROPY_THREADS * EACH) {
        const i64 left = width - at;
        Pack<typename E::Bits, EACH> pack;
        load(pack, row + at, left, wide);
        float values[EACH];
        float largest = total.largest;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            values[each] = each < left ? E::load(pack.at[each]) : minus_infinity();
            largest = fmaxf(largest, values[each]);
        }
        const float base = base_of(largest);
        float sum = total.sum * expf(total.largest - base);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            sum += expf(values[each] - base);
        }
        total = {largest, sum};
    }
    return total;
}

/// A block has a row.
template <class E>
__device__ void cross_entropy(const EntropyArgs &args) {
    ZX_SHARED(float, largest_of, WARPS);
    ZX_SHARED(float, sum_of, WARPS);
    const bool wide = chunk_is_aligned<E>(args.logits, args.width);
    for (i64 row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const auto *logits = static_cast<const typename E::Bits *>(args.logits) + row * args.width;
        Exponentials total = sum_of_lane<E>(logits, args.width, wide);
#pragma unroll
        for (u32 with = WARP / 2; with > 0; with /= 2) {
            const float largest = __shfl_xor_sync(ALL_LANES, total.largest, with);
            const float sum = __shfl_xor_sync(ALL_LANES, total.sum, with);
            total = merged(total, {largest, sum});
        }
        if (threadIdx.x % WARP == 0) {
            largest_of[threadIdx.x / WARP] = total.largest;
            sum_of[threadIdx.x / WARP] = total.sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            Exponentials whole = {args.largest[row], args.sum[row]};
            for (u32 warp = 0; warp < WARPS; warp++) {
                whole = merged(whole, {largest_of[warp], sum_of[warp]});
            }
            args.largest[row] = whole.largest;
            args.sum[row] = whole.sum;
            const i64 target = args.targets[row] - args.first;
            if (target >= 0 && target < args.width) {
                args.target_logit[row] = E::load(logits[target]);
            }
        }
        // The next row's sums must not come before these were read.
        __syncthreads();
    }
}

/// A block has a row: (exp(logit - largest) / sum - [column is the target]) * scale.
template <class E>
__device__ void gradient(const EntropyGradientArgs &args) {
    using Bits = typename E::Bits;
    const bool wide = chunk_is_aligned<E>(args.logits, args.width) && chunk_is_aligned<E>(args.gradients, args.width);
    for (i64 row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const auto *logits = static_cast<const Bits *>(args.logits) + row * args.width;
        auto *gradients = static_cast<Bits *>(args.gradients) + row * args.width;
        const float base = base_of(args.largest[row]);
        const float reciprocal = 1.0f / args.sum[row];
        const float scale = args.scale[row];
        const i64 target = args.targets[row] - args.first;
        for (i64 at = threadIdx.x * EACH; at < args.width; at += ENTROPY_THREADS * EACH) {
            const i64 left = args.width - at;
            Pack<Bits, EACH> pack;
            load(pack, logits + at, left, wide);
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                const float probability = expf(E::load(pack.at[each]) - base) * reciprocal;
                const float difference = at + each == target ? probability - 1.0f : probability;
                pack.at[each] = E::store(scale == 0.0f ? 0.0f : difference * scale);
            }
            store(gradients + at, pack, left, wide);
        }
    }
}

}  // namespace zx

#define ZX_CROSS_ENTROPY(name, E)                                                              \
    ZX_KERNEL(zx_cross_entropy_##name, zx::EntropyArgs, zx::ENTROPY_THREADS) {                 \
        zx::cross_entropy<zx::E>(args);                                                        \
    }                                                                                          \
    ZX_KERNEL(zx_cross_entropy_gradient_##name, zx::EntropyGradientArgs, zx::ENTROPY_THREADS) { \
        zx::gradient<zx::E>(args);                                                             \
    }

ZX_CROSS_ENTROPY(f32, F32)
ZX_CROSS_ENTROPY(bf16, Bf16)
ZX_CROSS_ENTROPY(f16, F16)

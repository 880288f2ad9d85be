// Tokens to the order of their experts and back. A source or position below zero is of a token that was dropped: its
// row is zero, and it adds nothing.
#include "zx/convert.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 PERMUTE_THREADS = 256;
constexpr int EACH = 8;

struct GatherArgs {
    const void *rows;
    void *out;
    const i64 *sources;
    /// One factor for each row of `out`, or null for 1, which keeps all bits but those of a NaN.
    const float *scales;
    i64 count;
    i64 width;
};

struct CombineArgs {
    const void *rows;
    void *out;
    /// `ways` for each token, in the order in which they are added.
    const i64 *positions;
    const float *weights;
    i64 count;
    i64 width;
    i64 ways;
};

template <class E>
__device__ inline bool rows_are_aligned(const void *rows, i64 width) {
    return is_aligned<typename E::Bits, EACH>(rows) && width % EACH == 0;
}

/// A block has a row of `out`: that of `rows` which `sources` names, times its scale in fp32.
template <class E>
__device__ void gather(const GatherArgs &args) {
    using Bits = typename E::Bits;
    const bool wide = rows_are_aligned<E>(args.rows, args.width) && rows_are_aligned<E>(args.out, args.width);
    for (i64 row = blockIdx.x; row < args.count; row += gridDim.x) {
        const i64 source = args.sources[row];
        const float scale = args.scales == nullptr ? 1.0f : args.scales[row];
        for (i64 at = threadIdx.x * EACH; at < args.width; at += PERMUTE_THREADS * EACH) {
            // Of a token that was dropped there is nothing to load.
            const i64 there = source < 0 ? 0 : args.width - at;
            Pack<Bits, EACH> pack;
            load(pack, static_cast<const Bits *>(args.rows) + source * args.width + at, there, wide && there > 0);
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                pack.at[each] = E::store(E::load(pack.at[each]) * scale);
            }
            store(static_cast<Bits *>(args.out) + row * args.width + at, pack, args.width - at, wide);
        }
    }
}

/// A block has a token: the sum of its rows times their weights, in fp32 and in their order.
template <class E>
__device__ void combine(const CombineArgs &args) {
    using Bits = typename E::Bits;
    const bool wide = rows_are_aligned<E>(args.rows, args.width) && rows_are_aligned<E>(args.out, args.width);
    for (i64 token = blockIdx.x; token < args.count; token += gridDim.x) {
        for (i64 at = threadIdx.x * EACH; at < args.width; at += PERMUTE_THREADS * EACH) {
            float sums[EACH] = {};
            for (i64 way = token * args.ways; way < (token + 1) * args.ways; way++) {
                const i64 position = args.positions[way];
                if (position < 0) {
                    continue;
                }
                const float weight = args.weights == nullptr ? 1.0f : args.weights[way];
                Pack<Bits, EACH> pack;
                load(pack, static_cast<const Bits *>(args.rows) + position * args.width + at, args.width - at, wide);
#pragma unroll
                for (int each = 0; each < EACH; each++) {
                    sums[each] += E::load(pack.at[each]) * weight;
                }
            }
            Pack<Bits, EACH> pack;
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                pack.at[each] = E::store(sums[each]);
            }
            store(static_cast<Bits *>(args.out) + token * args.width + at, pack, args.width - at, wide);
        }
    }
}

}  // namespace zx

#define ZX_PERMUTE(name, E)                                                                             \
    ZX_KERNEL(zx_gather_rows_##name, zx::GatherArgs, zx::PERMUTE_THREADS) { zx::gather<zx::E>(args); }   \
    ZX_KERNEL(zx_combine_rows_##name, zx::CombineArgs, zx::PERMUTE_THREADS) { zx::combine<zx::E>(args); }

ZX_PERMUTE(f32, F32)
ZX_PERMUTE(bf16, Bf16)
ZX_PERMUTE(f16, F16)

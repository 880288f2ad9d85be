// A gradient arriving in its home buffer: stored, or added in fp32 to what is there and rounded to nearest, ties to
// even, as crates/zeroxide-optim/src/accumulate.rs does it; here the gradient is multiplied by a scale first, in fp32.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 ACCUMULATE_THREADS = 256;
/// Packs that a lane loads before it waits for the first of them.
constexpr int AT_ONCE = 4;

struct AccumulateArgs {
    void *home;
    const void *gradient;
    i64 elements;
    float scale;
    u32 add;
};

/// COUNT packs, `stride` elements from one to the next; where they are not `wide`, one with `left` elements.
template <class To, class From, int COUNT>
__device__ void accumulate_packs(const AccumulateArgs &args, i64 at, i64 stride, i64 left, bool wide) {
    constexpr int EACH = each_of<typename To::Bits, typename From::Bits>;
    auto *home = static_cast<typename To::Bits *>(args.home) + at;
    const auto *gradient = static_cast<const typename From::Bits *>(args.gradient) + at;
    Pack<typename To::Bits, EACH> there[COUNT];
    Pack<typename From::Bits, EACH> arriving[COUNT];
#pragma unroll
    for (int next = 0; next < COUNT; next++) {
        load(arriving[next], gradient + next * stride, left, wide);
        if (args.add) {
            load(there[next], home + next * stride, left, wide);
        }
    }
#pragma unroll
    for (int next = 0; next < COUNT; next++) {
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float value = From::load(arriving[next].at[each]) * args.scale;
            there[next].at[each] = To::store(args.add ? To::load(there[next].at[each]) + value : value);
        }
        store(home + next * stride, there[next], left, wide);
    }
}

template <class To, class From>
__device__ void accumulate(const AccumulateArgs &args) {
    constexpr int EACH = each_of<typename To::Bits, typename From::Bits>;
    const auto *home = static_cast<const typename To::Bits *>(args.home);
    const auto *gradient = static_cast<const typename From::Bits *>(args.gradient);
    const bool aligned = is_aligned<typename To::Bits, EACH>(home) && is_aligned<typename From::Bits, EACH>(gradient);
    const i64 stride = grid_stride(gridDim.x, ACCUMULATE_THREADS, EACH);
    i64 at = first_item(blockIdx.x, ACCUMULATE_THREADS, threadIdx.x, EACH);
    if (aligned) {
        for (; at + (AT_ONCE - 1) * stride + EACH <= args.elements; at += AT_ONCE * stride) {
            accumulate_packs<To, From, AT_ONCE>(args, at, stride, EACH, true);
        }
    }
    for (; at < args.elements; at += stride) {
        const i64 left = args.elements - at;
        accumulate_packs<To, From, 1>(args, at, stride, left, aligned && left >= EACH);
    }
}

}  // namespace zx

#define ZX_ACCUMULATE(name, To, From) \
    ZX_KERNEL(name, zx::AccumulateArgs, zx::ACCUMULATE_THREADS) { zx::accumulate<zx::To, zx::From>(args); }

ZX_ACCUMULATE(zx_accumulate_f32_f32, F32, F32)
ZX_ACCUMULATE(zx_accumulate_f32_bf16, F32, Bf16)
ZX_ACCUMULATE(zx_accumulate_f32_f16, F32, F16)
ZX_ACCUMULATE(zx_accumulate_bf16_f32, Bf16, F32)
ZX_ACCUMULATE(zx_accumulate_bf16_bf16, Bf16, Bf16)
ZX_ACCUMULATE(zx_accumulate_bf16_f16, Bf16, F16)
ZX_ACCUMULATE(zx_accumulate_f16_f32, F16, F32)
ZX_ACCUMULATE(zx_accumulate_f16_bf16, F16, Bf16)
ZX_ACCUMULATE(zx_accumulate_f16_f16, F16, F16)

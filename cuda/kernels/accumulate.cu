// A gradient arriving in its home buffer: stored, or added in fp32 to what is there and rounded to nearest, ties to
// even, as crates/zeroxide-optim/src/accumulate.rs does it; here the gradient is multiplied by a scale first, in fp32.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 ACCUMULATE_THREADS = 256;
constexpr int EACH = 8;

struct AccumulateArgs {
    void *home;
    const void *gradient;
    i64 elements;
    float scale;
    u32 add;
};

template <class To, class From>
__device__ void accumulate(const AccumulateArgs &args) {
    auto *home = static_cast<typename To::Bits *>(args.home);
    const auto *gradient = static_cast<const typename From::Bits *>(args.gradient);
    const bool aligned = is_aligned<typename To::Bits, EACH>(home) && is_aligned<typename From::Bits, EACH>(gradient);
    const i64 stride = grid_stride(gridDim.x, ACCUMULATE_THREADS, EACH);
    for (i64 at = first_item(blockIdx.x, ACCUMULATE_THREADS, threadIdx.x, EACH); at < args.elements; at += stride) {
        const i64 left = args.elements - at;
        const bool wide = aligned && left >= EACH;
        Pack<typename To::Bits, EACH> there;
        Pack<typename From::Bits, EACH> arriving;
        load(arriving, gradient + at, left, wide);
        if (args.add) {
            load(there, home + at, left, wide);
        }
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float value = From::load(arriving.at[each]) * args.scale;
            there.at[each] = To::store(args.add ? To::load(there.at[each]) + value : value);
        }
        store(home + at, there, left, wide);
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

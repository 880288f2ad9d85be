// Many ranges of elements from one dtype to another: packs tensors into a flat buffer and takes such a buffer apart.
// Rounds to nearest, ties to even, as torch casts; a range that keeps its dtype keeps its bits.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 CAST_THREADS = 256;
constexpr int EACH = 8;
/// Elements that a block works on together; a tile is of one segment.
constexpr i64 TILE = CAST_THREADS * EACH;

struct CastSegment {
    const void *source;
    void *target;
    i64 elements;
    i64 first_tile;
};

struct CastArgs {
    const CastSegment *segments;
    i64 count;
    i64 tiles;
};

template <class From, class To>
struct Cast {
    __device__ static typename To::Bits of(typename From::Bits bits) { return To::store(From::load(bits)); }
};
template <class Same>
struct Cast<Same, Same> {
    __device__ static typename Same::Bits of(typename Same::Bits bits) { return bits; }
};

template <class From, class To>
__device__ void cast(const CastArgs &args) {
    for (i64 tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
        const CastSegment &segment =
            args.segments[segment_of(args.segments, args.count, tile, &CastSegment::first_tile)];
        const i64 at = (tile - segment.first_tile) * TILE + threadIdx.x * EACH;
        const i64 left = segment.elements - at;
        const auto *source = global(static_cast<const typename From::Bits *>(segment.source)) + at;
        auto *target = global(static_cast<typename To::Bits *>(segment.target)) + at;
        Pack<typename From::Bits, EACH> from;
        Pack<typename To::Bits, EACH> to;
        load(from, source, left, left >= EACH && is_aligned<typename From::Bits, EACH>(source));
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            to.at[each] = Cast<From, To>::of(from.at[each]);
        }
        store(target, to, left, left >= EACH && is_aligned<typename To::Bits, EACH>(target));
    }
}

}  // namespace zx

#define ZX_CAST(name, From, To) \
    ZX_KERNEL(name, zx::CastArgs, zx::CAST_THREADS) { zx::cast<zx::From, zx::To>(args); }

ZX_CAST(zx_cast_f32_f32, F32, F32)
ZX_CAST(zx_cast_f32_bf16, F32, Bf16)
ZX_CAST(zx_cast_f32_f16, F32, F16)
ZX_CAST(zx_cast_bf16_f32, Bf16, F32)
ZX_CAST(zx_cast_bf16_bf16, Bf16, Bf16)
ZX_CAST(zx_cast_bf16_f16, Bf16, F16)
ZX_CAST(zx_cast_f16_f32, F16, F32)
ZX_CAST(zx_cast_f16_bf16, F16, Bf16)
ZX_CAST(zx_cast_f16_f16, F16, F16)

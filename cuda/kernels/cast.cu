// Many ranges of elements from one dtype to another: packs tensors into a flat buffer and takes such a buffer apart.
// Rounds to nearest, ties to even, as torch casts; a range that keeps its dtype keeps its bits.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 CAST_THREADS = 256;
/// Elements that a block works on together; a tile is of one segment.
constexpr i64 TILE = 8192;
/// Packs that a lane loads before it waits for the first of them.
constexpr int AT_ONCE = 4;

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

/// Packs of one segment, at whose target they are aligned; the first may begin before the segment, the last end after it.
template <class From, class To>
struct Casting {
    using Source = typename From::Bits;
    using Target = typename To::Bits;
    static constexpr int EACH = each_of<Source, Target>;
    static constexpr i64 STRIDE = CAST_THREADS * EACH;
    static_assert(TILE % (STRIDE * AT_ONCE) == 0, "a tile is whole turns of a block");

    const Source *source;
    Target *target;
    i64 elements;
    /// By how much the source lies beyond an aligned address where the target is aligned.
    u32 shift;

    __device__ static Pack<Target, EACH> converted(const Pack<Source, EACH> &from) {
        Pack<Target, EACH> to;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            to.at[each] = Cast<From, To>::of(from.at[each]);
        }
        return to;
    }

    /// AT_ONCE packs, the first at `at`. Where the source is not aligned the words come that it lies in.
    template <bool SHIFTED>
    __device__ void inner(i64 at) const {
        Pack<Source, EACH> low[AT_ONCE], high[AT_ONCE];
#pragma unroll
        for (int next = 0; next < AT_ONCE; next++) {
            const Source *from = source + (at + next * STRIDE - shift);
            load_words(low[next], from);
            if (SHIFTED) {
                load_words(high[next], from + EACH);
            }
        }
#pragma unroll
        for (int next = 0; next < AT_ONCE; next++) {
            store_words(target + (at + next * STRIDE),
                        converted(SHIFTED ? shifted(low[next], high[next], shift) : low[next]));
        }
    }

    /// A pack that may lie partly or wholly outside of the segment.
    __device__ void outer(i64 at) const {
        const bool whole = at >= 0 && elements - at >= EACH;
        Pack<Source, EACH> from;
        if (whole && shift == 0) {
            load_words(from, source + at);
        } else {
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                from.at[each] = at + each >= 0 && at + each < elements ? source[at + each] : Source{};
            }
        }
        const Pack<Target, EACH> to = converted(from);
        if (whole) {
            store_words(target + at, to);
        } else {
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                if (at + each >= 0 && at + each < elements) {
                    target[at + each] = to.at[each];
                }
            }
        }
    }
};

template <class From, class To>
__device__ void cast(const CastArgs &args) {
    using Packs = Casting<From, To>;
    constexpr int EACH = Packs::EACH;
    for (i64 tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
        const CastSegment &segment =
            args.segments[segment_of(args.segments, args.count, tile, &CastSegment::first_tile)];
        const auto *source = global(static_cast<const typename Packs::Source *>(segment.source));
        auto *target = global(static_cast<typename Packs::Target *>(segment.target));
        const u32 before = misalignment<typename Packs::Target, EACH>(target);
        const u32 shift = (misalignment<typename Packs::Source, EACH>(source) + EACH - before) % EACH;
        const Packs packs{source, target, segment.elements, shift};
        const i64 first = (tile - segment.first_tile) * TILE - before;
        // The words that are loaded lie in the segment, too.
        const bool inside = first >= shift && first + TILE + EACH <= segment.elements;
        const i64 turn = inside ? AT_ONCE * Packs::STRIDE : Packs::STRIDE;
        for (i64 at = first + threadIdx.x * EACH; at < first + TILE; at += turn) {
            if (!inside) {
                packs.outer(at);
            } else if (shift == 0) {
                packs.template inner<false>(at);
            } else {
                packs.template inner<true>(at);
            }
        }
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

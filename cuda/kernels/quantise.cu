// Block-wise integers for compressed collectives: 256 elements share one bf16 scale, their largest magnitude over 127
// (int8) or 7 (int4), rounded up. int4 codes lie two in a byte, the first in the lower half. A code has 7 bits and a scale
// 8, so that their product is exact in fp32: whoever computes it, fused or not, has the same bits.
//
// Rounds to nearest, ties to even, or at random so that the mean is the value: element e then uses word e % 4 of the
// random numbers at `offset + e / 4`, whoever computes it. A block with an infinity or a NaN has the scale NaN, and so
// only NaN comes back from it.
#include "zx/convert.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"
#include "zx/philox.cuh"

namespace zx {

constexpr u32 QUANTISE_THREADS = 256;
/// Elements of a lane that quantises; a warp has a block.
constexpr int EACH = 8;
/// Packs that a lane loads before it waits for the first of them.
constexpr int AT_ONCE = 4;
constexpr i64 BLOCK = WARP * EACH;
constexpr float LARGEST = 3.4028234663852886e38f;

struct QuantiseArgs {
    const void *values;
    void *codes;
    u16 *scales;
    i64 elements;
    u64 seed;
    u64 offset;
    u32 at_random;
};

struct DequantiseArgs {
    const void *codes;
    const u16 *scales;
    void *values;
    i64 elements;
};

struct Int8 {
    static constexpr float LEVELS = 127.0f;
    template <int N>
    using Codes = Pack<i8, N>;
    using Element = i8;
    __device__ static i64 stored(i64 elements) { return elements; }
    template <class Packed>
    __device__ static void put(Packed &codes, int at, int code) { codes.at[at] = static_cast<i8>(code); }
    template <class Packed>
    __device__ static int get(const Packed &codes, int at) { return codes.at[at]; }
};

struct Int4 {
    static constexpr float LEVELS = 7.0f;
    template <int N>
    using Codes = Pack<u8, N / 2>;
    using Element = u8;
    __device__ static i64 stored(i64 elements) { return (elements + 1) / 2; }
    template <class Packed>
    __device__ static void put(Packed &codes, int at, int code) {
        const u8 half = static_cast<u8>(code & 15);
        codes.at[at / 2] = at % 2 ? static_cast<u8>(codes.at[at / 2] | half << 4) : half;
    }
    template <class Packed>
    __device__ static int get(const Packed &codes, int at) {
        const int half = at % 2 ? codes.at[at / 2] >> 4 : codes.at[at / 2] & 15;
        return (half ^ 8) - 8;
    }
};

/// The smallest bf16 that is not below a number of at least 0: no value of the block lies beyond its last code by more than
/// a rounding of the division.
__device__ inline u16 bf16_up(float value) { return static_cast<u16>((bits_of(value) + 0xffffu) >> 16); }

/// What the values of a block are divided by, and how.
struct Scale {
    float value;
    float reciprocal;
    /// Whether `quotient_near` gives correctly rounded quotients, but for tiny ones.
    bool near;
    __device__ explicit Scale(float value)
        : value(value), reciprocal(1.0f / value), near(value > 0x1p-60f && value < 0x1p20f) {}
};

/// `value / scale.value`, correctly rounded (Markstein 1990, "Computation of elementary functions on the IBM RISC
/// System/6000 processor"): from the second refinement on, the reciprocal being correctly rounded. That needs
/// exact remainders, which values below 2^-100 do not have; their quotients are below 2^-38 and have the value's sign or
/// are zero.
__device__ inline float quotient_near(float value, const Scale &scale) {
    float quotient = value * scale.reciprocal;
#pragma unroll
    for (int refinement = 0; refinement < 2; refinement++) {
        quotient = fmaf(fmaf(-quotient, scale.value, value), scale.reciprocal, quotient);
    }
    return quotient;
}

/// The code of a value; 0 where the scale is 0 or NaN. Quotients may lie a little beyond the levels.
template <class Int>
__device__ inline int code_of(float value, const Scale &scale, bool at_random, u32 word) {
    if (!(scale.value > 0.0f)) {
        return 0;
    }
    const float quotient = value / scale.value;
    const float rounded = at_random ? floorf(quotient + unit_interval(word)) : rintf(quotient);
    return static_cast<int>(fminf(fmaxf(rounded, -Int::LEVELS), Int::LEVELS));
}

/// The same where the scale is near, and no word at random stands for 0, with which a tiny quotient's sign would count.
template <class Int>
__device__ inline int code_near(float value, const Scale &scale, bool at_random, u32 word) {
    const float quotient = quotient_near(value, scale);
    const float moved = at_random ? quotient + unit_interval(word) : quotient;
    const int levels = static_cast<int>(Int::LEVELS);
    const int code = at_random ? small_floor(moved) : small_nearest_even(moved);
    return code > levels ? levels : code < -levels ? -levels : code;
}

/// A block, of which a lane has EACH values.
template <class Int, class From>
__device__ void quantise_block(const QuantiseArgs &args, i64 block, u32 lane,
                               const Pack<typename From::Bits, EACH> &pack) {
    const i64 at = block * BLOCK + lane * EACH;
    const i64 left = args.elements - at;
    float values[EACH];
    // Magnitudes are ordered as their bits are, with infinity and then NaN above all numbers.
    u32 largest = 0;
#pragma unroll
    for (int each = 0; each < EACH; each++) {
        values[each] = From::load(pack.at[each]);
        const u32 magnitude = bits_of(values[each]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = __reduce_max_sync(ALL_LANES, largest);
    const u16 rounded = largest < INFINITY_BITS ? bf16_up(of_bits(largest) / Int::LEVELS) : BF16_NAN;
    const Scale scale(bf16_to_f32(rounded));
    if (lane == 0) {
        args.scales[block] = rounded;
    }
    u32 words[EACH] = {};
    bool near = scale.near;
    if (args.at_random) {
#pragma unroll
        for (int four = 0; four < EACH; four += 4) {
            const Random4 random = random_at(args.seed, args.offset + static_cast<u64>(at + four) / 4);
#pragma unroll
            for (int each = 0; each < 4; each++) {
                words[four + each] = random.at[each];
                near = near && random.at[each] >= 256;
            }
        }
    }
    typename Int::template Codes<EACH> codes;
    if (near) {
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            Int::put(codes, each, code_near<Int>(values[each], scale, args.at_random, words[each]));
        }
    } else {
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            Int::put(codes, each, code_of<Int>(values[each], scale, args.at_random, words[each]));
        }
    }
    auto *to = static_cast<typename Int::Element *>(args.codes) + Int::stored(at);
    constexpr int STORED = sizeof(codes);
    store(to, codes, Int::stored(left), left >= EACH && is_aligned<typename Int::Element, STORED>(to));
}

template <class Int, class From>
__device__ void quantise(const QuantiseArgs &args) {
    constexpr int TOGETHER = 2;
    const u32 lane = threadIdx.x % WARP;
    const i64 blocks = (args.elements + BLOCK - 1) / BLOCK;
    const i64 stride = grid_stride(gridDim.x, QUANTISE_THREADS / WARP, 1);
    const auto *values = static_cast<const typename From::Bits *>(args.values);
    const bool aligned = is_aligned<typename From::Bits, EACH>(values);
    // All lanes of a warp have the same blocks.
    for (i64 first = first_item(blockIdx.x, QUANTISE_THREADS / WARP, threadIdx.x / WARP, 1); first < blocks;
         first += TOGETHER * stride) {
        Pack<typename From::Bits, EACH> packs[TOGETHER];
#pragma unroll
        for (int next = 0; next < TOGETHER; next++) {
            const i64 at = (first + next * stride) * BLOCK + lane * EACH;
            const i64 left = args.elements - at;
            load(packs[next], values + at, left, aligned && left >= EACH);
        }
#pragma unroll
        for (int next = 0; next < TOGETHER; next++) {
            if (first + next * stride < blocks) {
                quantise_block<Int, From>(args, first + next * stride, lane, packs[next]);
            }
        }
    }
}

/// COUNT packs, `stride` elements from one to the next; where they are not `wide`, one with `left` elements.
template <class Int, class To, int COUNT>
__device__ void dequantise_packs(const DequantiseArgs &args, i64 at, i64 stride, i64 left, bool wide) {
    constexpr int EACH = 16 / sizeof(typename To::Bits);
    using Codes = typename Int::template Codes<EACH>;
    const auto *from = static_cast<const typename Int::Element *>(args.codes);
    auto *to = static_cast<typename To::Bits *>(args.values) + at;
    Codes codes[COUNT];
    float scales[COUNT];
#pragma unroll
    for (int next = 0; next < COUNT; next++) {
        load(codes[next], from + Int::stored(at + next * stride), Int::stored(left), wide);
        scales[next] = bf16_to_f32(args.scales[(at + next * stride) / BLOCK]);
    }
#pragma unroll
    for (int next = 0; next < COUNT; next++) {
        Pack<typename To::Bits, EACH> pack;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float value = static_cast<float>(Int::get(codes[next], each)) * scales[next];
            // The scale was rounded up: its largest multiple may lie beyond the largest number, which it stands for.
            const float bounded = value > LARGEST ? LARGEST : value < -LARGEST ? -LARGEST : value;
            pack.at[each] = To::store(bounded);
        }
        store(to + next * stride, pack, left, wide);
    }
}

template <class Int, class To>
__device__ void dequantise(const DequantiseArgs &args) {
    constexpr int EACH = 16 / sizeof(typename To::Bits);
    constexpr int STORED = sizeof(typename Int::template Codes<EACH>);
    const auto *codes = static_cast<const typename Int::Element *>(args.codes);
    const bool aligned = is_aligned<typename Int::Element, STORED>(codes) &&
                         is_aligned<typename To::Bits, EACH>(args.values);
    const i64 stride = grid_stride(gridDim.x, QUANTISE_THREADS, EACH);
    i64 at = first_item(blockIdx.x, QUANTISE_THREADS, threadIdx.x, EACH);
    if (aligned) {
        for (; at + (AT_ONCE - 1) * stride + EACH <= args.elements; at += AT_ONCE * stride) {
            dequantise_packs<Int, To, AT_ONCE>(args, at, stride, EACH, true);
        }
    }
    for (; at < args.elements; at += stride) {
        const i64 left = args.elements - at;
        dequantise_packs<Int, To, 1>(args, at, stride, left, aligned && left >= EACH);
    }
}

}  // namespace zx

#define ZX_QUANTISE(name, Int, Float)                                                  \
    ZX_KERNEL(zx_quantise_##name, zx::QuantiseArgs, zx::QUANTISE_THREADS) {            \
        zx::quantise<zx::Int, zx::Float>(args);                                        \
    }                                                                                  \
    ZX_KERNEL(zx_dequantise_##name, zx::DequantiseArgs, zx::QUANTISE_THREADS) {        \
        zx::dequantise<zx::Int, zx::Float>(args);                                      \
    }

ZX_QUANTISE(int8_f32, Int8, F32)
ZX_QUANTISE(int8_bf16, Int8, Bf16)
ZX_QUANTISE(int8_f16, Int8, F16)
ZX_QUANTISE(int4_f32, Int4, F32)
ZX_QUANTISE(int4_bf16, Int4, Bf16)
ZX_QUANTISE(int4_f16, Int4, F16)

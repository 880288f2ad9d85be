// Conversions between fp32 and the 16-bit formats, with the bits of crates/zeroxide-optim/src/convert.rs: the
// instructions of a GPU agree with them on numbers, but not on what a NaN becomes.
#pragma once

#include "zx/portable.cuh"

namespace zx {

/// The canonical quiet NaN, whose upper half is the canonical bf16 one.
constexpr u32 NAN_BITS = 0x7fc00000u;
constexpr u32 INFINITY_BITS = 0x7f800000u;
/// What every NaN becomes in the 16-bit formats.
constexpr u16 BF16_NAN = 0x7fc0;
constexpr u16 F16_NAN = 0x7e00;

/// `x`, with every NaN made the canonical one.
__device__ inline float canonical(float x) { return is_nan(x) ? of_bits(NAN_BITS) : x; }

__device__ inline float bf16_to_f32(u16 bits) { return of_bits(static_cast<u32>(bits) << 16); }

/// Rounds to nearest, ties away from zero: the rounding of live weights. No NaN but the canonical one may come.
__device__ inline u16 half_up_of_canonical(float value) { return static_cast<u16>((bits_of(value) + 0x8000u) >> 16); }

/// Rounds to nearest, ties to even, as torch casts.
__device__ inline u16 bf16_nearest_even(float value) {
#ifndef ZX_EMULATED
    return is_nan(value) ? BF16_NAN : f32_to_bf16_by_instruction(value);
#else
    const u32 bits = bits_of(value);
    const u16 rounded = static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return is_nan(value) ? BF16_NAN : rounded;
#endif
}

/// fp16 bits to fp32, exactly; a NaN becomes any NaN.
__device__ inline float f16_to_f32(u16 bits) {
#ifndef ZX_EMULATED
    return f16_to_f32_by_instruction(bits);
#else
    constexpr u32 EXPONENT = 0x7c00u << 13;
    constexpr u32 REBIAS = (127u - 15u) << 23;
    const u32 magnitude = static_cast<u32>(bits & 0x7fffu) << 13;
    const u32 exponent = magnitude & EXPONENT;
    const u32 normal = magnitude + REBIAS;
    // Zero and subnormals get the exponent of 2^-14 and lose the implicit one again.
    const float tiny = of_bits(normal + (1u << 23)) - of_bits(113u << 23);
    const u32 finite = exponent == 0 ? bits_of(tiny) : normal;
    // Infinity and NaN: the exponent goes on to 255.
    const u32 magnitude_out = exponent == EXPONENT ? normal + REBIAS : finite;
    return of_bits(magnitude_out | (static_cast<u32>(bits & 0x8000u) << 16));
#endif
}

/// Rounds to nearest, ties to even; overflow becomes infinity.
__device__ inline u16 f16_nearest_even(float value) {
#ifndef ZX_EMULATED
    return is_nan(value) ? F16_NAN : f32_to_f16_by_instruction(value);
#else
    // 2^16, the first magnitude beyond every rounding to a finite fp16.
    constexpr u32 OVERFLOW_BITS = (127u + 16u) << 23;
    // 2^-14, the smallest normal fp16.
    constexpr u32 SMALLEST_NORMAL = (127u - 14u) << 23;
    // 0.5, whose last fraction bit is worth 2^-24, the smallest fp16: adding it rounds there.
    constexpr u32 ALIGN = 126u << 23;
    const u32 sign = (bits_of(value) >> 16) & 0x8000u;
    const u32 magnitude = bits_of(value) & 0x7fffffffu;
    const u32 odd = (magnitude >> 13) & 1u;
    const u32 normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    const u32 tiny = bits_of(of_bits(magnitude) + of_bits(ALIGN)) - ALIGN;
    const u32 finite = magnitude < SMALLEST_NORMAL ? tiny : normal;
    const u32 unsigned_bits = magnitude >= OVERFLOW_BITS ? 0x7c00u : finite;
    return is_nan(value) ? F16_NAN : static_cast<u16>(unsigned_bits | sign);
#endif
}

/// A storage dtype: how one element is read as fp32 and written from fp32, rounded to nearest, ties to even.
struct F32 {
    using Bits = float;
    __device__ static float load(float bits) { return bits; }
    __device__ static float store(float value) { return value; }
};
struct Bf16 {
    using Bits = u16;
    __device__ static float load(u16 bits) { return bf16_to_f32(bits); }
    __device__ static u16 store(float value) { return bf16_nearest_even(value); }
};
struct F16 {
    using Bits = u16;
    __device__ static float load(u16 bits) { return f16_to_f32(bits); }
    __device__ static u16 store(float value) { return f16_nearest_even(value); }
};

/// A dtype that is known when a kernel is launched, as the wrappers number them.
enum class Dtype : u32 { F32 = 0, Bf16 = 1, F16 = 2 };

}  // namespace zx

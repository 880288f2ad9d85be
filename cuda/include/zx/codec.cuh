// How an fp32 weight is stored, as crates/zeroxide-optim/src/codec has it: a live weight and what makes it exact.
#pragma once

#include "zx/convert.cuh"

namespace zx {

/// The fp32 weight of a bf16 one and the 16 bits that its rounding took away, or for any other pair one that rounds
/// half up to `high`.
__device__ inline float join(u16 high, u16 low) {
    const u32 upper = static_cast<u32>(high) << 16;
    const float joined = of_bits(upper + static_cast<u32>(static_cast<int>(static_cast<short>(low))));
    return is_nan(joined) ? of_bits(upper) : joined;
}

/// An element that a format or a rule does not have.
struct Nothing {};

/// fp32 weights, exact by themselves.
struct Whole {
    using Live = float;
    using Exact = Nothing;
    __device__ static float decode(float live, Nothing) { return live; }
    __device__ static void encode(float weight, float &live, Nothing &) { live = canonical(weight); }
};

/// An fp32 master weight beside a bf16 one; a live weight that is not its rounding was changed by somebody, and counts.
struct MasterBf16 {
    using Live = u16;
    using Exact = float;
    __device__ static float decode(u16 live, float master) {
        return join(live, static_cast<u16>(bits_of(master) & 0xffffu));
    }
    __device__ static void encode(float weight, u16 &live, float &master) {
        master = canonical(weight);
        live = half_up_of_canonical(master);
    }
};

/// The same beside an fp16 one.
struct MasterF16 {
    using Live = u16;
    using Exact = float;
    __device__ static float decode(u16 live, float master) {
        return f16_nearest_even(master) == live ? master : f16_to_f32(live);
    }
    __device__ static void encode(float weight, u16 &live, float &master) {
        live = f16_nearest_even(weight);
        master = canonical(weight);
    }
};

/// The halves of an fp32 weight, the upper one live.
struct Split {
    using Live = u16;
    using Exact = u16;
    __device__ static float decode(u16 live, u16 low) { return join(live, low); }
    __device__ static void encode(float weight, u16 &live, u16 &low) {
        const float master = canonical(weight);
        live = half_up_of_canonical(master);
        low = static_cast<u16>(bits_of(master) & 0xffffu);
    }
    /// Within an update that rounds: nothing is lost here.
    __device__ static void encode_drawn(float weight, u32, u16 &live, u16 &low) { encode(weight, live, low); }
};

/// The upper bits of `value` and zeros in those of `mask`: rounded up in magnitude where `noise`, not above `mask`,
/// carries over. A finite value stays finite; infinities and the canonical NaN stay what they are.
__device__ inline float round_magnitude(float value, u32 noise, u32 mask) {
    const u32 sum = bits_of(value) + noise;
    return of_bits(((sum & INFINITY_BITS) == INFINITY_BITS ? bits_of(value) : sum) & ~mask);
}

/// A bf16 weight and the third byte of its master, which is rounded at random by the lowest byte of a word.
struct Compact {
    using Live = u16;
    using Exact = u8;
    __device__ static float decode(u16 live, u8 low) { return join(live, static_cast<u16>(low << 8)); }
    __device__ static void encode_drawn(float weight, u32 word, u16 &live, u8 &low) {
        const float master = round_magnitude(canonical(weight), word & 0xffu, 0xffu);
        live = half_up_of_canonical(master);
        low = static_cast<u8>(bits_of(master) >> 8);
    }
};

}  // namespace zx

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): random bits that
// are a function of a counter and a key, so that they do not depend on who draws them.
#pragma once

#include "zx/portable.cuh"

namespace zx {

struct Random4 {
    u32 at[4];
};

__device__ inline Random4 philox(Random4 counter, u32 key0, u32 key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 first = static_cast<u64>(0xD2511F53u) * counter.at[0];
        const u64 second = static_cast<u64>(0xCD9E8D57u) * counter.at[2];
        counter = {{static_cast<u32>(second >> 32) ^ counter.at[1] ^ key0, static_cast<u32>(second),
                    static_cast<u32>(first >> 32) ^ counter.at[3] ^ key1, static_cast<u32>(first)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/// The four words at a place of the sequence that belongs to a seed.
__device__ inline Random4 random_at(u64 seed, u64 place) {
    return philox({{static_cast<u32>(place), static_cast<u32>(place >> 32), 0, 0}}, static_cast<u32>(seed),
                  static_cast<u32>(seed >> 32));
}

/// A multiple of 2^-24 in [0, 1).
__device__ inline float unit_interval(u32 word) { return static_cast<float>(word >> 8) * 5.9604644775390625e-8f; }

}  // namespace zx

// Put before a file of cuda/kernels by `g++ -include`: the names of CUDA that kernels use, and `zx_launch`, which runs them.
//
// What this cannot show: the order in which one block sees what another wrote, occupancy, bank conflicts, and time.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.h"

#define ZX_EMULATED 1

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

#define __global__
#define __device__
#define __host__
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
#define __syncthreads() emu::block_barrier()

inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_barrier(mask); }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

namespace emu {

template <class T>
T shuffle(unsigned mask, T value, unsigned source, bool within) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = shuffled(mask, bits, source, within);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emu

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, unsigned width = 32) {
    const unsigned at = emu::lane() % 32;
    return emu::shuffle(mask, value, at + step, at % width + step < width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned with, unsigned width = 32) {
    const unsigned at = emu::lane() % 32;
    return emu::shuffle(mask, value, at ^ with, (at ^ with) / width <= at / width);
}

namespace emu {

/// A kernel of the file, by its name.
struct Registered {
    Registered(const char *name, void (*call)(const void *), size_t bytes, unsigned threads)
        : name(name), call(call), bytes(bytes), threads(threads) {
        all().push_back(this);
    }
    const char *name;
    void (*call)(const void *);
    size_t bytes;
    unsigned threads;
    static std::vector<const Registered *> &all() {
        static std::vector<const Registered *> every;
        return every;
    }
};

template <class Args, void (*kernel)(const Args)>
void call(const void *args) {
    kernel(*static_cast<const Args *>(args));
}

inline int refuse(const std::string &why) {
    here.failure = why;
    return 1;
}

}  // namespace emu

/// What the last launch that failed has to say.
extern "C" const char *zx_failure() { return emu::here.failure.c_str(); }

/// Runs a kernel to its end: 0, or 1 where it failed. `order`: 0 forward, 1 reverse, 2 random by `seed`.
extern "C" int zx_launch(const char *entry, unsigned grid, unsigned block, size_t shared, const void *args, size_t bytes,
                         int order, unsigned seed) {
    using namespace emu;
    for (const Registered *each : Registered::all()) {
        if (std::strcmp(each->name, entry) != 0) {
            continue;
        }
        if (each->bytes != bytes) {
            return refuse(std::string(entry) + ": expected arguments of " + std::to_string(each->bytes) + " bytes, got " +
                          std::to_string(bytes));
        }
        if (block == 0 || grid == 0 || block > each->threads) {
            return refuse(std::string(entry) + ": expected at least one block of 1 to " + std::to_string(each->threads) +
                          " lanes, got " + std::to_string(grid) + " of " + std::to_string(block));
        }
        std::vector<char> copy(static_cast<const char *>(args), static_cast<const char *>(args) + bytes);
        here.grid = {grid, 1, 1};
        here.block = {block, 1, 1};
        here.dynamic.assign(shared, 0);
        here.body = [each, &copy] { each->call(copy.data()); };
        run_grid(static_cast<Order>(order), seed);
        here.body = nullptr;
        return here.failure.empty() ? 0 : 1;
    }
    return refuse(std::string(entry) + ": no kernel of that name");
}

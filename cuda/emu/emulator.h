// Put before a file of cuda/kernels by `g++ -include`: the names of CUDA that kernels use. emulator.cpp is linked to it
// and has `zx_launch`, which runs them.
//
// What this cannot show: the order in which one block sees what another wrote, occupancy, bank conflicts, and time.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ZX_EMULATED 1

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emu {

struct Index {
    unsigned x, y, z;
};
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
/// A lane's number in its block.
unsigned lane();

void block_barrier();
void warp_barrier(uint32_t mask);
/// What lane `source` of the warp brought, when all lanes of `mask` have brought something; the own value where not
/// `within`.
uint64_t shuffled(uint32_t mask, uint64_t value, unsigned source, bool within);
/// Ends the launch where a GPU would fault.
void check_aligned(const void *address, size_t bytes);

/// Memory of a block that all its lanes see, filled with NaN when a block begins.
struct Shared {
    explicit Shared(size_t bytes);
    void *memory() const { return start; }
    size_t bytes;
    char *start;
};

/// A kernel of the file, by its name.
struct Registered {
    Registered(const char *name, void (*call)(const void *), size_t bytes, unsigned threads);
    const char *name;
    void (*call)(const void *);
    size_t bytes;
    unsigned threads;
};

template <class Args, void (*kernel)(const Args)>
void call(const void *args) {
    kernel(*static_cast<const Args *>(args));
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, bool within) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffled(mask, bits, source, within);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emu

#define __global__
#define __device__
#define __host__
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
#define __syncthreads() emu::block_barrier()

inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_barrier(mask); }

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

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    for (unsigned with = 16; with > 0; with /= 2) {
        const unsigned other = __shfl_xor_sync(mask, value, with);
        value = other > value ? other : value;
    }
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

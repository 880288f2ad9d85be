// What differs between a GPU and the host that runs the same source: how kernels are declared, shared memory, and the
// bits of a float. Everything else is CUDA C++ without inline PTX. `ZX_EMULATED` is defined by cuda/emu/emulator.h.
//
// Kernels are compiled with --fmad=false: a fused multiply-add stands where fmaf or fma is written and nowhere else.
#pragma once

namespace zx {

using u8 = unsigned char;
using i8 = signed char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(i64) == 8 && sizeof(void *) == 8, "sizes of the C ABI");

}  // namespace zx

// ZX_KERNEL(name, Args, threads) { body } defines the entry point `name`, whose one parameter is `const Args args`.
#ifdef ZX_EMULATED
#define ZX_KERNEL(name, Args, threads)                                                      \
    static void name(const Args args);                                                      \
    static const emu::Registered registered_##name(#name, &emu::call<Args, name>, sizeof(Args), threads); \
    static void name(const Args args)
// ZX_SHARED(type, name, count) declares `count` elements of the block's shared memory, whose first contents are
// undefined.
#define ZX_SHARED(type, name, count)                   \
    static emu::Shared shared_##name(sizeof(type) * (count)); \
    type *const name = static_cast<type *>(shared_##name.memory())
#else
#define ZX_KERNEL(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Args args)
#define ZX_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace zx {

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ inline u32 bits_of(float value) { return __float_as_uint(value); }
__device__ inline float of_bits(u32 bits) { return __uint_as_float(bits); }

/// The same address, known to be of global memory: one that was itself loaded from memory could be of any, and its
/// loads would be generic.
template <class T>
__device__ inline T *global(T *address) {
#ifndef ZX_EMULATED
    __builtin_assume(__isGlobal(address));
#endif
    return address;
}

#ifndef ZX_EMULATED
/// One instruction for what convert.cuh does in many; they agree on all but NaN, which no caller relies on.
__device__ inline float f16_to_f32_by_instruction(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline u16 f32_to_f16_by_instruction(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ inline u16 f32_to_bf16_by_instruction(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

/// Stores a word to global memory in one instruction: the compiler makes four of an assignment where the word was put
/// together from fp32 values.
template <class Word>
__device__ inline void store_word(Word *to, Word word) {
    *to = word;
}
#ifndef ZX_EMULATED
__device__ inline void store_word(uint4 *to, uint4 word) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
}
__device__ inline void store_word(uint2 *to, uint2 word) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
                 : "memory");
}
#endif

__device__ inline bool is_nan(float value) { return value != value; }

/// The nearest integer to a number below 2^22 in magnitude, ties to even: the last bits of a sum whose last bit is worth 1.
__device__ inline int small_nearest_even(float value) {
    return static_cast<int>(bits_of(value + 12582912.0f) - bits_of(12582912.0f));
}

/// The largest integer that is not above such a number: the same sum, rounded down.
__device__ inline int small_floor(float value) {
#ifndef ZX_EMULATED
    return static_cast<int>(bits_of(__fadd_rd(value, 12582912.0f)) - bits_of(12582912.0f));
#else
    return static_cast<int>(floorf(value));
#endif
}

/// The smaller of two.
template <class T>
__device__ inline T least(T a, T b) {
    return b < a ? b : a;
}

}  // namespace zx

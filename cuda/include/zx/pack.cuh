// Elements that move between memory and registers together, 16 bytes a load where their address allows it.
#pragma once

#include "zx/portable.cuh"

namespace zx {

template <int BYTES>
struct WordOf;
template <>
struct WordOf<16> {
    using Type = uint4;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<4> {
    using Type = u32;
};
template <>
struct WordOf<2> {
    using Type = u16;
};

/// N elements in registers; its words are the widest that their bytes come to.
template <class T, int N>
union Pack {
    static constexpr int WIDTH = sizeof(T) * N >= 16 ? 16 : sizeof(T) * N;
    using Word = typename WordOf<WIDTH>::Type;
    static constexpr int WORDS = sizeof(T) * N / WIDTH;
    static_assert(WORDS * WIDTH == sizeof(T) * N, "elements fill whole words");

    /// Quarters of a 16-byte word; a pack of 2 bytes has less than one.
    static constexpr int PARTS = sizeof(T) * N >= 4 ? sizeof(T) * N / 4 : 1;

    Word words[WORDS];
    u32 parts[PARTS];
    T at[N];
};

/// Packs for a kernel whose lanes move packs of two dtypes: as many elements as fill 16 bytes of the wider one, so that
/// the lanes of a warp together move whole lines.
template <class T, class Other>
constexpr int each_of = 16 / (sizeof(T) > sizeof(Other) ? sizeof(T) : sizeof(Other));

/// Whether packs of N elements from `address` on can be moved in whole words.
template <class T, int N>
__device__ inline bool is_aligned(const void *address) {
    return reinterpret_cast<u64>(address) % Pack<T, N>::WIDTH == 0;
}

template <class T, int N>
__device__ inline void load_words(Pack<T, N> &to, const T *from) {
    using Word = typename Pack<T, N>::Word;
#ifdef ZX_EMULATED
    emu::check_aligned(from, Pack<T, N>::WIDTH);
#endif
#pragma unroll
    for (int word = 0; word < Pack<T, N>::WORDS; word++) {
        to.words[word] = reinterpret_cast<const Word *>(from)[word];
    }
}

/// To global memory.
template <class T, int N>
__device__ inline void store_words(T *to, const Pack<T, N> &from) {
    using Word = typename Pack<T, N>::Word;
#ifdef ZX_EMULATED
    emu::check_aligned(to, Pack<T, N>::WIDTH);
#endif
#pragma unroll
    for (int word = 0; word < Pack<T, N>::WORDS; word++) {
        store_word(reinterpret_cast<Word *>(to) + word, from.words[word]);
    }
}

/// Loads N elements one by one, or where only `left` are there, those, and zero for the rest.
template <class T, int N>
__device__ inline void load_singly(Pack<T, N> &to, const T *from, i64 left) {
#pragma unroll
    for (int at = 0; at < N; at++) {
        to.at[at] = at < left ? from[at] : T{};
    }
}

/// Stores N elements one by one, or where there is room for `left` only, those.
template <class T, int N>
__device__ inline void store_singly(T *to, const Pack<T, N> &from, i64 left) {
#pragma unroll
    for (int at = 0; at < N; at++) {
        if (at < left) {
            to[at] = from.at[at];
        }
    }
}

/// Loads in words where `wide`, which needs N elements at an aligned address, else one by one.
template <class T, int N>
__device__ inline void load(Pack<T, N> &to, const T *from, i64 left, bool wide) {
    if (wide) {
        load_words(to, from);
    } else {
        load_singly(to, from, left);
    }
}

template <class T, int N>
__device__ inline void store(T *to, const Pack<T, N> &from, i64 left, bool wide) {
    if (wide) {
        store_words(to, from);
    } else {
        store_singly(to, from, left);
    }
}

/// By how many elements `address` lies beyond one at which packs of N elements are aligned.
template <class T, int N>
__device__ inline u32 misalignment(const T *address) {
    return static_cast<u32>(reinterpret_cast<u64>(address) / sizeof(T) % N);
}

/// The N elements from element `shift` of `low` on, behind which `high` lies.
template <class T, int N>
__device__ inline Pack<T, N> shifted(const Pack<T, N> &low, const Pack<T, N> &high, u32 shift) {
    constexpr int PARTS = Pack<T, N>::PARTS;
    const u32 bytes = shift * static_cast<u32>(sizeof(T));
    u32 parts[2 * PARTS];
#pragma unroll
    for (int at = 0; at < PARTS; at++) {
        parts[at] = low.parts[at];
        parts[PARTS + at] = high.parts[at];
    }
#pragma unroll
    for (int step = PARTS / 2; step > 0; step /= 2) {
        const bool moves = bytes & (4 * step);
#pragma unroll
        for (int at = 0; at + step < 2 * PARTS; at++) {
            parts[at] = moves ? parts[at + step] : parts[at];
        }
    }
    Pack<T, N> result;
#pragma unroll
    for (int at = 0; at < PARTS; at++) {
        result.parts[at] = bytes & 2 ? parts[at] >> 16 | parts[at + 1] << 16 : parts[at];
    }
    return result;
}

}  // namespace zx

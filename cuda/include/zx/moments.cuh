// A rule's own tensors where they are kept in fewer bits than fp32, as crates/zeroxide-optim/src/codec/moments has them: a
// team of lanes has a block of 64 elements, EACH elements a lane, and rounds every value at random by its word.
#pragma once

#include "zx/codec.cuh"
#include "zx/update.cuh"

namespace zx {

/// Elements that share a unit, that an update rounds together, and whose random words share counters.
constexpr i64 STATE_BLOCK = 64;
/// Lanes that have a block: neighbours in a warp.
constexpr u32 TEAM = STATE_BLOCK / EACH;
static_assert(TEAM == 8 && WARP % TEAM == 0, "a warp has whole teams, whose lanes have three bits");

/// What a lane has of a tensor, as a rule sees it.
template <class T>
struct Elements {
    T at[EACH];
};
using Values = Elements<float>;

/// What a lane needs to find its elements of a tensor. `at`: the first of them; `left`: how many there are from it on,
/// which may be none; `wide`: all of its tensors can be moved in words there.
struct Place {
    i64 at;
    i64 left;
    bool wide;

    __device__ u32 in_team() const { return static_cast<u32>(at) % STATE_BLOCK / EACH; }
    /// Whether the team has an element at all.
    __device__ bool in_block() const { return left + static_cast<i64>(in_team()) * EACH > 0; }
};

/// bf16, 16 random bits an element: the lower ones of its word, or where it is the second of a rule's tensors the upper.
template <bool SIGNED, bool SECOND>
struct Bf16Moment {
    using Packed = Pack<u16, EACH>;
    u16 *start;
    __device__ explicit Bf16Moment(void *address) : start(static_cast<u16 *>(address)) {}
    __device__ bool aligned() const { return is_aligned<u16, EACH>(start); }

    __device__ void load(Values &values, const Place &place) const {
        Packed packed;
        zx::load(packed, start + place.at, place.left, place.wide);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            values.at[each] = bf16_to_f32(packed.at[each]);
        }
    }
    __device__ void store(const Values &values, const u32 (&words)[EACH], const Place &place) const {
        Packed packed;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const u32 noise = SECOND ? words[each] >> 16 : words[each] & 0xffffu;
            packed.at[each] =
                static_cast<u16>(bits_of(round_magnitude(canonical(values.at[each]), noise, 0xffffu)) >> 16);
        }
        zx::store(start + place.at, packed, place.left, place.wide);
    }
};

/// An odd multiple of 2^-24 between 0 and 1, by the upper 23 bits of a word.
__device__ inline float open_interval(u32 word) { return of_bits(0x3f800000u | word >> 9) - 0.99999994039535522f; }

/// A block: a bf16 unit and 64 codes of 8 bits, which stand for `c |c| u`. Blocks have 66 bytes, so that no words are
/// aligned in all of them: codes move two at a time.
template <bool SIGNED, bool SECOND>
struct Block8Moment {
    static constexpr i64 BLOCK_WORDS = 1 + STATE_BLOCK / 2;
    static constexpr float LARGEST = SIGNED ? 127.0f : 255.0f;
    /// The smallest normal bf16: no unit but zero is below it.
    static constexpr u32 LEAST_UNIT = 0x0080u;
    union Codes {
        Pack<u16, EACH / 2> words;
        u8 at[EACH];
    };
    u16 *start;
    __device__ explicit Block8Moment(void *address) : start(static_cast<u16 *>(address)) {}
    __device__ bool aligned() const { return true; }
    __device__ u16 *unit_of(const Place &place) const { return start + place.at / STATE_BLOCK * BLOCK_WORDS; }
    __device__ u16 *codes_of(const Place &place) const { return unit_of(place) + 1 + place.in_team() * (EACH / 2); }

    __device__ void load(Values &values, const Place &place) const {
        // Beyond the last element of a tensor its block goes on, and has codes there.
        const i64 count = place.in_block() ? EACH / 2 : 0;
        const float unit = bf16_to_f32(count > 0 ? *unit_of(place) : 0);
        Codes codes;
        load_singly(codes.words, codes_of(place), count);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float code = SIGNED ? static_cast<float>(static_cast<i8>(codes.at[each])) : codes.at[each];
            values.at[each] = code * fabsf(code) * unit;
        }
    }

    /// The largest value of the block as an integer, for every lane of the team: NaN lies above infinity, and where values
    /// must not be negative, what is so above both.
    __device__ static u32 most(const Values &values) {
        u32 found = 0;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            // Adding zero makes -0 a 0.
            const u32 bits = bits_of(values.at[each] + 0.0f) & (SIGNED ? 0x7fffffffu : 0xffffffffu);
            found = bits > found ? bits : found;
        }
#pragma unroll
        for (u32 step = TEAM / 2; step > 0; step /= 2) {
            const u32 other = __shfl_xor_sync(ALL_LANES, found, step);
            found = other > found ? other : found;
        }
        return found;
    }

    /// The unit of which the largest value is the square of the largest code, rounded up.
    __device__ static u16 unit_for(u32 most) {
        if (most >= INFINITY_BITS) {
            return BF16_NAN;
        }
        if (most == 0) {
            return 0;
        }
        const u32 above = (bits_of(of_bits(most) / (LARGEST * LARGEST)) + 0xffffu) >> 16;
        const u32 unit = above > LEAST_UNIT ? above : LEAST_UNIT;
        // Next to the largest fp32 value the unit below: the largest code stands for a finite value.
        const bool finite = bits_of(of_bits(unit << 16) * (LARGEST * LARGEST)) < INFINITY_BITS;
        return static_cast<u16>(unit - (finite ? 0u : 1u));
    }

    /// The code of a value in units of `unit`: one up where `chance` is below the part of the way to the next code.
    __device__ static u8 code_of(float value, float unit, float inverse, float chance) {
        constexpr float ALIGN = 12582912.0f;
        constexpr float HIGHEST = LARGEST - 1.0f;
        const float magnitude = fabsf(value);
        const float root = sqrtf(magnitude * inverse);
        // The code below, or one less where the root is next to a whole number; then the other one is certain.
        const float below = fminf(root - 0.5f + ALIGN - ALIGN, HIGHEST);
        const float beyond = magnitude - below * below * unit;
        const float width = (below + below + 1.0f) * unit;
        const float up = chance * width < beyond ? 1.0f : 0.0f;
        // What must not be negative and is not zero never becomes zero.
        const float floor = !SIGNED && magnitude > 0.0f ? 1.0f : 0.0f;
        const float found = fmaxf(below + up, floor);
        return static_cast<u8>(bits_of((value < 0.0f ? -found : found) + ALIGN));
    }

    /// All lanes of the warp come here together.
    __device__ void store(const Values &values, const u32 (&words)[EACH], const Place &place) const {
        const u16 unit = unit_for(most(values));
        const float step = bf16_to_f32(unit);
        const float inverse = unit == 0 ? 0.0f : 1.0f / step;
        Codes codes;
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            // The lowest byte of a word is the weight's; an odd multiple is any word as often as another.
            const u32 word = SECOND ? words[each] * 0x9e3779b1u : words[each];
            const u8 code = code_of(values.at[each], step, inverse, open_interval(word));
            codes.at[each] = unit == BF16_NAN ? static_cast<u8>(0) : code;
        }
        const i64 count = place.in_block() ? EACH / 2 : 0;
        store_singly(codes_of(place), codes.words, count);
        if (count > 0 && place.in_team() == 0) {
            *unit_of(place) = unit;
        }
    }
};

/// A tensor that a rule does not have.
struct NoMoment {
    __device__ explicit NoMoment(void *) {}
    __device__ bool aligned() const { return true; }
    __device__ void load(Elements<Nothing> &, const Place &) const {}
    __device__ void store(const Elements<Nothing> &, const u32 (&)[EACH], const Place &) const {}
};

/// What keeps a rule's elements: a `Moment`, or nothing where there are none.
template <template <bool, bool> class Moment, class Element, bool SIGNED, bool SECOND>
struct KeptBy {
    using Type = Moment<SIGNED, SECOND>;
};
template <template <bool, bool> class Moment, bool SIGNED, bool SECOND>
struct KeptBy<Moment, Nothing, SIGNED, SECOND> {
    using Type = NoMoment;
};

}  // namespace zx

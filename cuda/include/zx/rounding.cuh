// One step of any rule over the state of one parameter in a format that rounds: the loop of
// crates/zeroxide-optim/src/rounding.rs, by the arithmetic of the exact formats, whose results are rounded at random.
//
// A team of 8 lanes has a block of 64 elements, each lane 8 in a row, which are 16 bytes of the 16-bit tensors. The block's
// random words are those of 16 counters, four words each, and element i has word i / 16 of counter i % 16. So the four
// lanes whose elements share counters draw two of them each and pass the words on: no counter is drawn twice. A block of
// codes finds its largest value by the same shuffles. Every lane of a warp takes the same turns, also beyond the end.
#pragma once

#include "zx/moments.cuh"
#include "zx/philox.cuh"

namespace zx {

template <class Rule>
struct RoundingArgs {
    void *live;
    void *exact;
    void *first;
    void *second;
    const void *grad;
    i64 elements;
    /// The parameter's own stream of random bits, and how often it was updated before.
    u64 stream;
    u64 updates;
    Dtype grad_dtype;
    Rule rule;
};

/// The words of a lane's elements, of those in crates/zeroxide-optim/src/draw.rs. All lanes of the warp come here together.
__device__ inline void draw(u32 (&words)[EACH], u64 stream, u64 updates, i64 block, u32 in_team) {
    // Lanes with the same `column` share the counters 8 * column to 8 * column + 7; `row` is which word of each is a lane's.
    const u32 column = in_team % 2, row = in_team / 2;
#pragma unroll
    for (u32 own = 0; own < 2; own++) {
        const u32 counter = 8 * column + 2 * row + own;
        const u64 place = static_cast<u64>(block);
        Random4 drawn = philox({{static_cast<u32>(place), static_cast<u32>(place >> 32),
                                 static_cast<u32>(updates >> 32) << 16 | counter, static_cast<u32>(updates)}},
                               static_cast<u32>(stream), static_cast<u32>(stream >> 32));
        // Four lanes have four words each, and lane i is to have word i of each: two by two, then one by one.
#pragma unroll
        for (int at = 0; at < 2; at++) {
            const u32 got = __shfl_xor_sync(ALL_LANES, row & 2 ? drawn.at[at] : drawn.at[2 + at], 4);
            drawn.at[at] = row & 2 ? got : drawn.at[at];
            drawn.at[2 + at] = row & 2 ? drawn.at[2 + at] : got;
        }
#pragma unroll
        for (int at = 0; at < 4; at += 2) {
            const u32 got = __shfl_xor_sync(ALL_LANES, row & 1 ? drawn.at[at] : drawn.at[at + 1], 2);
            drawn.at[at] = row & 1 ? got : drawn.at[at];
            drawn.at[at + 1] = row & 1 ? drawn.at[at + 1] : got;
        }
#pragma unroll
        for (int from = 0; from < 4; from++) {
            words[2 * from + own] = drawn.at[from];
        }
    }
}

/// Gradients of any dtype as fp32: what is loaded needs no registers then. All lanes of a launch take the same branch.
__device__ inline void load_gradients(Values &to, const void *grad, Dtype dtype, const Place &place) {
    Gradients loaded;
    loaded.load(grad, dtype, place.at, place.left, place.wide);
#pragma unroll
    for (int each = 0; each < EACH; each++) {
        to.at[each] = loaded.at(each, dtype);
    }
}

template <class Codec, template <bool, bool> class Moment, class Rule>
__device__ void update_rounding(const RoundingArgs<Rule> &args) {
    using First = typename Rule::First;
    using Second = typename Rule::Second;
    const Tensor<typename Codec::Live> live_tensor(args.live);
    const Tensor<typename Codec::Exact> exact_tensor(args.exact);
    const typename KeptBy<Moment, First, Rule::FIRST_IS_SIGNED, false>::Type first_tensor(args.first);
    // Of all rules' second tensors none has values below zero.
    const typename KeptBy<Moment, Second, false, true>::Type second_tensor(args.second);
    const bool aligned = live_tensor.aligned() && exact_tensor.aligned() && first_tensor.aligned() &&
                         second_tensor.aligned() && is_aligned<float, EACH>(args.grad);
    const i64 stride = grid_stride(gridDim.x, UPDATE_THREADS, EACH);
    i64 at = first_item(blockIdx.x, UPDATE_THREADS, threadIdx.x, EACH);
    for (; at - threadIdx.x % WARP * EACH < args.elements; at += stride) {
        const i64 left = args.elements - at;
        const Place place = {at, left, aligned && left >= EACH};
        typename Tensor<typename Codec::Live>::Packed live;
        typename Tensor<typename Codec::Exact>::Packed exact;
        Elements<First> first;
        Elements<Second> second;
        live_tensor.load(live, at, left, place.wide);
        exact_tensor.load(exact, at, left, place.wide);
        first_tensor.load(first, place);
        second_tensor.load(second, place);
        Values gradients;
        load_gradients(gradients, args.grad, args.grad_dtype, place);
        u32 words[EACH];
        draw(words, args.stream, args.updates, at / STATE_BLOCK, place.in_team());
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float weight = Codec::decode(live.at[each], exact.at[each]);
            const float updated = args.rule.update(weight, first.at[each], second.at[each], gradients.at[each]);
            Codec::encode_drawn(updated, words[each], live.at[each], exact.at[each]);
        }
        live_tensor.store(live, at, left, place.wide);
        exact_tensor.store(exact, at, left, place.wide);
        first_tensor.store(first, words, place);
        second_tensor.store(second, words, place);
    }
}

}  // namespace zx

// The entry points of a rule, one for each format that rounds.
#define ZX_ROUNDING(name, Rule)                                            \
    ZX_KERNEL(name##_split_bf16, zx::RoundingArgs<Rule>, zx::UPDATE_THREADS) { \
        zx::update_rounding<zx::Split, zx::Bf16Moment>(args);              \
    }                                                                      \
    ZX_KERNEL(name##_compact, zx::RoundingArgs<Rule>, zx::UPDATE_THREADS) {  \
        zx::update_rounding<zx::Compact, zx::Block8Moment>(args);          \
    }

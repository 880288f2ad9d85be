// One step of any rule over the state of one range of parameters in any format: the loop of
// crates/zeroxide-optim/src/kernel.rs. A rule has the constants of a step and the update of one element.
#pragma once

#include "zx/codec.cuh"
#include "zx/index.cuh"
#include "zx/pack.cuh"

namespace zx {

constexpr u32 UPDATE_THREADS = 256;
/// Elements of a lane's turn: 16 bytes of the 16-bit tensors, two loads of the others.
constexpr int EACH = 8;

template <class Rule>
struct UpdateArgs {
    void *live;
    void *exact;
    void *first;
    void *second;
    const void *grad;
    i64 elements;
    Dtype grad_dtype;
    Rule rule;
};

/// The elements of one tensor that a lane works on.
template <class T>
struct Tensor {
    using Packed = Pack<T, EACH>;
    T *start;
    __device__ explicit Tensor(void *address) : start(static_cast<T *>(address)) {}
    __device__ bool aligned() const { return is_aligned<T, EACH>(start); }
    __device__ void load(Packed &to, i64 at, i64 left, bool wide) const { zx::load(to, start + at, left, wide); }
    __device__ void store(const Packed &from, i64 at, i64 left, bool wide) const {
        zx::store(start + at, from, left, wide);
    }
};
/// Of a tensor that is not there, none.
template <>
struct Tensor<Nothing> {
    struct Packed {
        Nothing at[EACH];
    };
    __device__ explicit Tensor(void *) {}
    __device__ bool aligned() const { return true; }
    __device__ void load(Packed &, i64, i64, bool) const {}
    __device__ void store(const Packed &, i64, i64, bool) const {}
};

/// Gradients of any dtype. All lanes of a launch take the same branch.
struct Gradients {
    Pack<float, EACH> full;
    Pack<u16, EACH> half;

    __device__ void load(const void *grad, Dtype dtype, i64 at, i64 left, bool wide) {
        if (dtype == Dtype::F32) {
            zx::load(full, static_cast<const float *>(grad) + at, left, wide);
        } else {
            zx::load(half, static_cast<const u16 *>(grad) + at, left, wide);
        }
    }
    __device__ float at(int each, Dtype dtype) const {
        return dtype == Dtype::F32    ? full.at[each]
               : dtype == Dtype::Bf16 ? bf16_to_f32(half.at[each])
                                      : f16_to_f32(half.at[each]);
    }
};

template <class Codec, class Rule>
__device__ void update(const UpdateArgs<Rule> &args) {
    const Tensor<typename Codec::Live> live_tensor(args.live);
    const Tensor<typename Codec::Exact> exact_tensor(args.exact);
    const Tensor<typename Rule::First> first_tensor(args.first);
    const Tensor<typename Rule::Second> second_tensor(args.second);
    const bool aligned = live_tensor.aligned() && exact_tensor.aligned() && first_tensor.aligned() &&
                         second_tensor.aligned() && is_aligned<float, EACH>(args.grad);
    const i64 stride = grid_stride(gridDim.x, UPDATE_THREADS, EACH);
    for (i64 at = first_item(blockIdx.x, UPDATE_THREADS, threadIdx.x, EACH); at < args.elements; at += stride) {
        const i64 left = args.elements - at;
        const bool wide = aligned && left >= EACH;
        Gradients gradients;
        typename Tensor<typename Codec::Live>::Packed live;
        typename Tensor<typename Codec::Exact>::Packed exact;
        typename Tensor<typename Rule::First>::Packed first;
        typename Tensor<typename Rule::Second>::Packed second;
        gradients.load(args.grad, args.grad_dtype, at, left, wide);
        live_tensor.load(live, at, left, wide);
        exact_tensor.load(exact, at, left, wide);
        first_tensor.load(first, at, left, wide);
        second_tensor.load(second, at, left, wide);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const float weight = Codec::decode(live.at[each], exact.at[each]);
            const float gradient = gradients.at(each, args.grad_dtype);
            const float updated = args.rule.update(weight, first.at[each], second.at[each], gradient);
            Codec::encode(updated, live.at[each], exact.at[each]);
        }
        live_tensor.store(live, at, left, wide);
        exact_tensor.store(exact, at, left, wide);
        first_tensor.store(first, at, left, wide);
        second_tensor.store(second, at, left, wide);
    }
}

}  // namespace zx

// The entry points of a rule, one for each format.
#define ZX_UPDATE(name, Rule)                                                                                     \
    ZX_KERNEL(name##_fp32, zx::UpdateArgs<Rule>, zx::UPDATE_THREADS) { zx::update<zx::Whole>(args); }               \
    ZX_KERNEL(name##_master_bf16, zx::UpdateArgs<Rule>, zx::UPDATE_THREADS) { zx::update<zx::MasterBf16>(args); }   \
    ZX_KERNEL(name##_master_f16, zx::UpdateArgs<Rule>, zx::UPDATE_THREADS) { zx::update<zx::MasterF16>(args); }     \
    ZX_KERNEL(name##_split, zx::UpdateArgs<Rule>, zx::UPDATE_THREADS) { zx::update<zx::Split>(args); }

// Adagrad with the bits of crates/zeroxide-optim/src/rules/adagrad.rs.
#include "zx/rounding.cuh"

namespace zx {

struct Adagrad {
    using First = float;
    static constexpr bool FIRST_IS_SIGNED = false;
    using Second = Nothing;
    float grad_scale;
    float weight_decay;
    float eps;
    float minus_step;

    __device__ float update(float weight, float &sum, Nothing &, float gradient) const {
        gradient = fmaf(weight_decay, weight, grad_scale * gradient);
        const float squares = fmaf(gradient, gradient, sum);
        const float quotient = gradient / (sqrtf(squares) + eps);
        sum = canonical(squares);
        return fmaf(minus_step, quotient, weight);
    }
};

}  // namespace zx

ZX_UPDATE(zx_adagrad, zx::Adagrad)
ZX_ROUNDING(zx_adagrad, zx::Adagrad)

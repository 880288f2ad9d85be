// SGD with momentum with the bits of crates/zeroxide-optim/src/rules/sgd.rs.
#include "zx/rounding.cuh"

namespace zx {

struct Sgd {
    using First = float;
    static constexpr bool FIRST_IS_SIGNED = true;
    using Second = Nothing;
    float grad_scale;
    float weight_decay;
    float keep;
    float fresh;
    float minus_lr_grad;
    float minus_lr_buffer;

    __device__ float update(float weight, float &buffer, Nothing &, float gradient) const {
        gradient = fmaf(weight_decay, weight, grad_scale * gradient);
        const float momentum = fmaf(keep, buffer, fresh * gradient);
        // Both terms first: where the weight is much larger, only their sum may be rounded to it.
        const float change = fmaf(minus_lr_buffer, momentum, minus_lr_grad * gradient);
        buffer = canonical(momentum);
        return weight + change;
    }
};

}  // namespace zx

ZX_UPDATE(zx_sgd, zx::Sgd)
ZX_ROUNDING(zx_sgd, zx::Sgd)

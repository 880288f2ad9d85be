// Lion with the bits of crates/zeroxide-optim/src/rules/lion.rs.
#include "zx/rounding.cuh"

namespace zx {

struct Lion {
    using First = float;
    static constexpr bool FIRST_IS_SIGNED = true;
    using Second = Nothing;
    float direction_keep;
    float direction_new;
    float mean_keep;
    float mean_new;
    float minus_lr;
    float shrink;

    /// -1, 0 or 1; a NaN stays one.
    __device__ static float sign(float x) {
        const float nonzero = x == 0.0f ? 0.0f : copysignf(1.0f, x);
        return is_nan(x) ? x : nonzero;
    }

    __device__ float update(float weight, float &mean, Nothing &, float gradient) const {
        const float direction = fmaf(direction_keep, mean, direction_new * gradient);
        const float change = fmaf(shrink, weight, minus_lr * sign(direction));
        mean = canonical(fmaf(mean_keep, mean, mean_new * gradient));
        return weight + change;
    }
};

}  // namespace zx

ZX_UPDATE(zx_lion, zx::Lion)
ZX_ROUNDING(zx_lion, zx::Lion)

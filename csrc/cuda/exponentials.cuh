// What the kernels that store exponentials, and those that read them, have in common.
#pragma once

#include <cfloat>
#include <cmath>

#include "kernels.h"
#include "math.cuh"

namespace dpo_kernels::cuda {

// Where a packed exponential is 1: fp16 then has 11 bits down to 2^-29, and the least is 2^-39.
constexpr float kPackedOne = 0x1p15f;
// A square of an exponential that is not packed stays far within fp32 as one of its part 2^-40.
constexpr float kSquared = 0x1p-40f;

// z = outer * u for u = inner * a, or tanh(inner * a) with a softcap, where outer > 0. A scale that fp32 does not have
// is 0.
struct Scales {
  double inner, outer;

  explicit Scales(const Transform& t) {
    const Logit<double> logit(t);
    outer = std::fabs(logit.outer);
    inner = logit.capped ? logit.inner : logit.outer < 0 ? -1 : 1;
    if (!logit.capped && outer < FLT_MIN) inner = 0, outer = 1;
  }
};

__device__ __forceinline__ bool is_far(float top, float shift, float far_above) { return top > shift + far_above; }

}  // namespace dpo_kernels::cuda

// What the CUDA kernels compute of single numbers, and of the threads of a block together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "../tiles.h"

namespace dpo_kernels::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr unsigned kAllLanes = 0xffffffffu;

// What is computed in, for what is stored.
template <class S>
struct Accumulate {
  using T = float;
};
template <>
struct Accumulate<double> {
  using T = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class S>
__device__ __forceinline__ S narrow(typename Accumulate<S>::T x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// exp x for x <= 0: one multiplication and the special function unit, 2 ulp and the rounding of x log2 e.
__device__ __forceinline__ float exp_of(float x) { return exp2f(x * kLog2E); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// In the unit that is exponentials' own: of fp32 log2, of fp64 nats.
template <class T>
constexpr T kUnit = 1;
template <>
constexpr float kUnit<float> = kLog2E;
__device__ __forceinline__ float power(float x) { return exp2f(x); }
__device__ __forceinline__ double power(double x) { return exp(x); }
// From here on neighbouring logits are so far apart that the smaller one's exponential is 0 beside the larger one's, be
// it to the base e or 2.
template <class T>
constexpr T kHuge = FLT_MAX;
template <>
constexpr float kHuge<float> = 1 << 29;
template <class T>
__device__ __forceinline__ T unit_of(T top) {
  return fabs(top) < kHuge<T> ? kUnit<T> : T(1);
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// What exponentials are taken relative to, so that each is one multiply-add and one instruction: `top` in this unit,
// rounded. exponent(top) is what that leaves, which is exact: exp(z - top) = power(exponent(z)) / power(exponent(top)).
template <class T>
struct Shift {
  T unit, by;

  // A product would be put, unrounded, into multiply-adds with what it is subtracted from.
  __device__ __forceinline__ Shift(T top, T unit) : unit(unit), by(multiply_add(top, unit, T(0))) {}
  __device__ __forceinline__ T exponent(T z) const { return multiply_add(z, unit, -by); }
};

// tanh x and 1 - tanh^2 x, which keeps its digits where tanh reaches 1. Below 0.625, where 1 - e cancels,
// t + t^3 p(t^2): csrc/README.md.
__device__ __forceinline__ float tanh_of(float x, float& slope) {
  const float t = fabsf(x), e = exp_of(-2 * t), inverse = __fdividef(1.0f, 1 + e);
  slope = 4 * e * inverse * inverse;
  const float s = t * t;
  float p = fmaf(s, -5.704978e-3f, 2.06390787e-2f);
  p = fmaf(p, s, -5.37397116e-2f);
  p = fmaf(p, s, 1.33314416e-1f);
  p = fmaf(p, s, -3.33332807e-1f);
  return copysignf(t < 0.625f ? fmaf(t * s, p, t) : (1 - e) * inverse, x);
}
__device__ __forceinline__ double tanh_of(double x, double& slope) {
  const double c = 1 / cosh(x);
  slope = c * c;
  return tanh(x);
}

// z = outer * (x.W + b), or with a softcap outer * tanh(inner * (x.W + b)).
template <class T>
struct Logit {
  T inner, outer;
  bool capped;

  explicit Logit(const Transform& t)
      : inner(static_cast<T>(t.softcap != 0 ? t.scale / t.softcap : 0)),
        outer(static_cast<T>(t.softcap != 0 ? t.softcap / t.temperature : t.slope())),
        capped(t.softcap != 0) {}
};

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
template <>
__device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}

// `combine` over all threads of a block, in an order that depends on nothing else; every thread gets the result.
// shared: an entry for each warp. The block must be of whole warps.
template <class T, class Combine>
__device__ __forceinline__ T over_block(T x, T* shared, Combine combine) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
  __syncthreads();  // what an earlier call left there has been read
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < warps; ++i) x = combine(x, shared[i]);
  return x;
}

}  // namespace dpo_kernels::cuda

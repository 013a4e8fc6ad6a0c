// Vectors of fp32, as wide as the instruction set that this file is compiled for, and what the kernels compute on them.
//
// Written with the compilers' own vector types, so that the same lines make AVX-512, AVX2, SSE2 and NEON; intrinsics
// stand only where these types have no word for an instruction. fp64 goes through the same kernels one number at a
// time. Everything is in an unnamed namespace and calls no template or inline function of the standard library: the
// same name compiled for two instruction sets must not be merged by the linker.
#pragma once

#include <cmath>
#include <cstdint>

#include "../arithmetic.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dpo_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// The unmasked intrinsics start from undefined registers, which GCC 12 warns of; with all lanes chosen the code is the same.
constexpr __mmask16 kAll = 0xffff;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

// The arithmetic of a storage type: `T` the scalar, `V` the vector of `lanes` of them.
template <class S>
struct Arithmetic {
  using T = float;
  using V = F32;
  static constexpr int lanes = kLanes;
};
template <>
struct Arithmetic<double> {
  using T = double;
  using V = double;
  static constexpr int lanes = 1;
};

// 0 + x would turn -0 to 0
inline F32 broadcast(float x) { return x - F32{}; }
inline double broadcast(double x) { return x; }

// The second operand where one is NaN.
inline F32 maximum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(kAll, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return __builtin_ia32_maxps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline double maximum(double a, double b) { return a > b ? a : b; }

inline F32 minimum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(kAll, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return __builtin_ia32_minps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline double first_lane(F32 x) { return x[0]; }
inline double first_lane(double x) { return x; }

// In fp64 and in the order of the lanes.
inline double sum_lanes(F32 x) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}
inline double sum_lanes(double x) { return x; }

inline double max_lanes(F32 x) {
  float max = x[0];
  for (int i = 1; i < kLanes; ++i) max = x[i] > max ? x[i] : max;
  return max;
}
inline double max_lanes(double x) { return x; }

// x in the first `count` lanes, `other` behind them.
inline F32 first_lanes(F32 x, int count, float other) {
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count ? x : broadcast(other);
}
inline double first_lanes(double x, int, double) { return x; }

inline U32 broadcast_bits(uint32_t x) { return x - U32{}; }

// 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
constexpr float kRound = 12582912.0f;

inline F32 scale_by_power_of_two(F32 x, F32 n, U32 n_bits) {
#if defined(__AVX512F__)
  (void)n_bits;
  return _mm512_maskz_scalef_ps(kAll, x, n);
#else
  // In two steps, neither of which leaves the exponents that fp32 has before the last one rounds.
  (void)n;
  const I32 integer = (I32)n_bits - bit_cast<int32_t>(kRound);
  const I32 half = integer >> 1;
  return x * (F32)((half + 127) << 23) * (F32)((integer - half + 127) << 23);
#endif
}

// exp(x), at most 1.02 ulp off (measured over all x); NaN, inf and 0 as they should be. x = n log(2) + r, exp(r) = 1 + r + r^2 q(r) with |r| <= log(2) / 2. See csrc/README.md.
inline F32 exp(F32 x) {
  // Beyond these the result is inf or 0. Ordered so that NaN stays.
  const F32 y = minimum(broadcast(89.0f), maximum(broadcast(-105.0f), x));
  const F32 shifted = y * 1.44269504089f + kRound;
  const F32 n = shifted - kRound;
  F32 r = y - n * 0x1.62e000p-1f;  // log(2) = high + low; n * high is exact
  r = r - n * 3.19461849453e-5f;
  F32 q = r * 0x1.6a234ep-10f + 0x1.123a6cp-7f;
  q = q * r + 0x1.5558f4p-5f;
  q = q * r + 0x1.555490p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const F32 p = (r * r * q + r) + 1.0f;
  return scale_by_power_of_two(p, n, (U32)shifted);
}
inline double exp(double x) { return ::exp(x); }

// tanh(x), and slope = 1 - tanh(x)^2 as 4 e / (1 + e)^2 with e = exp(-2 |x|), which keeps its digits where tanh reaches 1.
inline F32 tanh(F32 x, F32* slope) {
  const I32 sign = (I32)x & INT32_MIN;
  const F32 t = (F32)((I32)x ^ sign);
  const F32 e = exp(t * -2.0f);
  const F32 inverse = 1.0f / (1.0f + e);
  *slope = 4.0f * e * inverse * inverse;
  const F32 large = (1.0f - e) * inverse;
  const F32 s = x * x;  // below 0.625, where 1 - e cancels: t + t^3 p(t^2)
  F32 p = s * -0x1.75e1a8p-8f + 0x1.522692p-6f;
  p = p * s + -0x1.b83c58p-5f;
  p = p * s + 0x1.110726p-3f;
  p = p * s + -0x1.555532p-2f;
  const F32 small = t * s * p + t;
  const F32 magnitude = t < 0.625f ? small : large;
  return (F32)((I32)magnitude | sign);
}
inline double tanh(double x, double* slope) {
  const double c = 1 / ::cosh(x);
  *slope = c * c;
  return ::tanh(x);
}

template <class S>
typename Arithmetic<S>::V load(const S* p);

template <>
inline F32 load(const float* p) {
  F32 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <>
inline double load(const double* p) {
  return *p;
}
template <>
inline F32 load(const BFloat16* p) {
  U16 bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (F32)(__builtin_convertvector(bits, U32) << 16);
}
template <>
inline F32 load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  U16 half;
  __builtin_memcpy(&half, p, sizeof half);
  const U32 bits = __builtin_convertvector(half, U32), sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  // The exponent moves by 112 by a product, which also makes subnormal numbers normal; inf and NaN keep theirs.
  const F32 finite = (F32)rest * 0x1p112f;
  return (F32)(sign | ((bits & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : (U32)finite));
#endif
}

inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }
inline void store(double* p, double x) { *p = x; }
inline void store(BFloat16* p, F32 x) {
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const U32 nan = (bits >> 16) | 0x40u;
  const U16 half = __builtin_convertvector(x == x ? rounded : nan, U16);
  __builtin_memcpy(p, &half, sizeof half);
}
inline void store(Half* p, F32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(kAll, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const U32 bits = (U32)x, magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 brings their last bit to where fp32 rounds. Normal ones: as for bf16, 13 bits shorter.
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? broadcast_bits(0x7c00u) : half;
  half = magnitude > 0x7f800000u ? broadcast_bits(0x7e00u) : half;
  const U16 narrow = __builtin_convertvector(half | ((bits & 0x80000000u) >> 16), U16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
#endif
}

template <class S>
inline typename Arithmetic<S>::V load_partial(const S* p, int count) {
  S buffer[Arithmetic<S>::lanes] = {};
  __builtin_memcpy(buffer, p, count * sizeof(S));
  return load(buffer);
}
template <class S>
inline void store_partial(S* p, typename Arithmetic<S>::V x, int count) {
  S buffer[Arithmetic<S>::lanes];
  store(buffer, x);
  __builtin_memcpy(p, buffer, count * sizeof(S));
}

// The lanes of a and b taken in turns, from the first (kHigh 0) or the second half of each.
template <int kHigh>
inline F32 interleave(F32 a, F32 b) {
  constexpr int h = kHigh * kLanes / 2, other = h + kLanes;
#if defined(__clang__)
#define DPO_SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12 knows this form alone
#define DPO_SHUFFLE(...) __builtin_shuffle(a, b, I32{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
  return DPO_SHUFFLE(h, other, h + 1, other + 1, h + 2, other + 2, h + 3, other + 3, h + 4, other + 4, h + 5,
                     other + 5, h + 6, other + 6, h + 7, other + 7);
#elif defined(__AVX2__)
  return DPO_SHUFFLE(h, other, h + 1, other + 1, h + 2, other + 2, h + 3, other + 3);
#else
  return DPO_SHUFFLE(h, other, h + 1, other + 1);
#endif
#undef DPO_SHUFFLE
}

// Transposes a square of lanes in registers: each step interleaves a row with the one half the square below it.
inline void transpose_square(F32 (&rows)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    F32 next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace dpo_kernels

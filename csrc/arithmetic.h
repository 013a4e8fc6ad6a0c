// The arithmetic that the kernels of every device share: storage formats and the logit transform.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DPO_HOST_DEVICE __host__ __device__ inline
#else  // inlined always: a copy compiled for one instruction set must not serve the files of another
#define DPO_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace dpo_kernels {

// z = softcap(scale * a) / temperature, softcap(u) = cap * tanh(u / cap), for a = x.W + b. softcap 0: none.
struct Transform {
  double scale, softcap, temperature;

  DPO_HOST_DEVICE double slope() const { return scale / temperature; }
  DPO_HOST_DEVICE bool is_identity() const { return softcap == 0 && slope() == 1; }
};

// How tensors are stored; arithmetic is fp32, or fp64 for fp64.
enum class DType : int { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Type punning that the optimizer sees through.
template <class To, class From>
DPO_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace dpo_kernels

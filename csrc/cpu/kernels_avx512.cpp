// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c on x86-64.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "kernels_impl.h"

const dpo_kernels::Kernels* dpo_kernels::avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? &kernels
             : nullptr;
}
#else
const dpo_kernels::Kernels* dpo_kernels::avx512_kernels() { return nullptr; }
#endif

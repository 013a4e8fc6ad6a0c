// Compiled with -mavx2 -mfma -mf16c on x86-64.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "kernels_impl.h"

const dpo_kernels::Kernels* dpo_kernels::avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  // Whatever has AVX2 has F16C, which not every compiler has a name for here.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : nullptr;
}
#else
const dpo_kernels::Kernels* dpo_kernels::avx2_kernels() { return nullptr; }
#endif

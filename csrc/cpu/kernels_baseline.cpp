// Whatever the compiler's default target has: SSE2 on x86-64, NEON on AArch64.
#include "kernels_impl.h"

const dpo_kernels::Kernels* dpo_kernels::baseline_kernels() {
  static constexpr Kernels kernels = make_kernels("baseline");
  return &kernels;
}

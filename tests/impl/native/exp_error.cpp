// Largest error of the kernels' exp and tanh in units of the last place of fp32, over every `stride`-th bit pattern of fp32
// from -104 to 89, NaN excluded. With stride 1, over all of them. One line for each instruction set that this machine has.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

using namespace dpo_kernels;

// Of fp32 at `exact`, which may be subnormal: where fp32 would put it.
static double ulp(double exact) {
  if (exact == 0) return 0x1p-149;
  return std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
}

struct Worst {
  double error = 0;
  float at = 0;
  void take(float got, double exact, float x) {
    if (exact >= 0x1.ffffffp127) {  // what rounds to inf
      if (!std::isinf(got)) error = INFINITY, at = x;
      return;
    }
    const double e = std::fabs(got - exact) / ulp(exact);
    if (!(e <= error)) error = e, at = x;
  }
};

int main(int argc, char** argv) {
  const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  std::vector<const Kernels*> all;
  for (const Kernels* k : {baseline_kernels(), avx2_kernels(), avx512_kernels()}) {
    if (k) all.push_back(k);
  }
  std::vector<Worst> normal(all.size()), subnormal(all.size());
  const auto bits_of = [](float x) { return bit_cast<uint32_t>(x); };
  constexpr size_t kChunk = 1 << 16;
  std::vector<float> x, y;
  std::vector<double> exact;
  const auto flush = [&] {
    exact.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) exact[i] = std::exp(static_cast<double>(x[i]));
    for (size_t k = 0; k < all.size(); ++k) {
      y = x;
      all[k]->exp(y.data(), static_cast<int64_t>(y.size()));
      for (size_t i = 0; i < x.size(); ++i) {
        (exact[i] < 0x1p-126 ? subnormal : normal)[k].take(y[i], exact[i], x[i]);
      }
    }
    x.clear();
  };
  for (const auto& [first, last] : {std::pair{bits_of(0.0f), bits_of(89.0f)}, {bits_of(-0.0f), bits_of(-104.0f)}}) {
    for (uint64_t bits = first; bits <= last; bits += stride) {
      x.push_back(bit_cast<float>(static_cast<uint32_t>(bits)));
      if (x.size() == kChunk) flush();
    }
  }
  flush();
  for (size_t k = 0; k < all.size(); ++k) {
    std::printf("%s normal %.4f at %a subnormal %.4f at %a\n", all[k]->name, normal[k].error, normal[k].at,
                subnormal[k].error, subnormal[k].at);
  }
}

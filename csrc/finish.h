// What the sums of a whole row say; derived in dpo_kernels/impl/fold.py.
#pragma once

#include <cmath>

#include "tiles.h"

namespace dpo_kernels {

enum Stat { kEntropy, kIsTop1, kMeanLogit, kLogSumSqProbs };
constexpr int kAllStats = 4;
// Those that are asked for, in their order.
struct Stats {
  int count;
  int names[kAllStats];
};

// Of a row's entries beside the label: their largest, and sums over them of e = exp(z - shift), e (z - shift) and e^2,
// with a shift that is no larger than `top`. sum_z is of all entries.
struct RowSums {
  double top, shift, target, sum, sum_z, sum_ez, sum_sq;
  bool label_is_first;  // of equal largest ones
};

// logp [n], norm [2, n], which may be null, and values [count, n], all of type T.
template <class T>
struct Finished {
  T *logp, *norm, *values;
  int64_t n, v;
  Stats stats;

  // Returns what exp(z - shift) is multiplied by to be a probability.
  DPO_HOST_DEVICE double write(int64_t row, const RowSums& of) const {
    const double lead = of.target - of.shift;
    const double own = lead > 0 ? -log1p(of.sum * exp(-lead)) : lead - log(of.sum + exp(lead));
    // what is kept of it is what the others are relative to
    const double most = of.top > of.target ? of.top : of.target, kept = static_cast<T>(most);
    const double largest = std::isfinite(kept) ? kept : most, scale = exp(of.shift - largest);
    const double total = of.sum * scale + exp(of.target - largest), log_prob_of_shift = (of.shift - largest) - log(total);
    logp[row] = static_cast<T>(own);
    if (norm != nullptr) {
      norm[row] = static_cast<T>(largest);
      norm[n + row] = static_cast<T>(total);
    }
#if defined(__CUDACC__)
#pragma unroll  // an array that is indexed by what is known stays out of memory
#endif
    for (int k = 0; k < kAllStats; ++k) {
      if (k >= stats.count) break;
      double value = 0;
      switch (stats.names[k]) {
        case kEntropy:
          value = (own == -INFINITY ? 0 : -exp(own) * own) - scale / total * (of.sum_ez + of.sum * log_prob_of_shift);
          break;
        case kIsTop1:
          value = of.target > of.top || (of.target == of.top && of.label_is_first);
          break;
        case kMeanLogit:
          value = of.sum_z / static_cast<double>(v);
          break;
        default: {
          const double a = log(of.sum_sq) + 2 * log_prob_of_shift, b = 2 * own, most = a > b ? a : b;
          value = most == -INFINITY ? most : most + log1p(exp(-fabs(a - b)));
        }
      }
      values[k * n + row] = static_cast<T>(value);
    }
    return scale / total;
  }

  // Of a row that is not to count.
  DPO_HOST_DEVICE void write_zeros(int64_t row) const {
    logp[row] = norm[row] = norm[n + row] = 0;
    for (int k = 0; k < stats.count; ++k) values[k * n + row] = 0;
  }
};

// Of one row of a state; y: its label.
DPO_HOST_DEVICE RowSums row_sums(const FoldState& state, int64_t row, int64_t y) {
  const double* at = state.data + row;
  const auto field = [&](Field f) { return at[f * state.stride]; };
  return {field(kMax), field(kMax), field(kTarget), field(kSum), field(kSumZ), field(kSumEz), field(kSumSq),
          y < state.argmax[row]};
}

}  // namespace dpo_kernels

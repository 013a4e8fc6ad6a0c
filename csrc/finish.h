// What a finished sweep says of a row. Derived in dpo_kernels/impl/fold.py, whose `finish` this is.
#pragma once

#include <cmath>

#include "tiles.h"

namespace dpo_kernels {

enum Stat { kEntropy, kIsTop1, kMeanLogit, kLogSumSqProbs };
// Those that are asked for, in their order.
struct Stats {
  int count;
  int names[4];
};

// Writes logp [n], norm [2, n] and the statistics [count, n] of one row.
template <class T>
DPO_HOST_DEVICE void finish_row(const FoldState& state, const int64_t* y, int64_t row, int64_t n, int64_t v,
                                const Stats& stats, T* logp, T* norm, T* values) {
  const double* at = state.data + row;
  const double top = at[kMax * state.stride], target = at[kTarget * state.stride], sum = at[kSum * state.stride];
  const double lead = target - top;
  const double own = lead > 0 ? -log1p(sum * exp(-lead)) : lead - log(sum + exp(lead));
  const double shift = top > target ? top : target, scale = exp(top - shift);
  const double total = sum * scale + exp(target - shift), log_prob_of_top = (top - shift) - log(total);
  logp[row] = static_cast<T>(own);
  norm[row] = static_cast<T>(shift);
  norm[n + row] = static_cast<T>(total);
  for (int k = 0; k < stats.count; ++k) {
    double value = 0;
    switch (stats.names[k]) {
      case kEntropy:
        value = (own == -INFINITY ? 0 : -exp(own) * own) -
                scale / total * (at[kSumEz * state.stride] + sum * log_prob_of_top);
        break;
      case kIsTop1:
        value = target > top || (target == top && y[row] < state.argmax[row]);
        break;
      case kMeanLogit:
        value = at[kSumZ * state.stride] / static_cast<double>(v);
        break;
      default: {
        const double a = log(at[kSumSq * state.stride]) + 2 * log_prob_of_top, b = 2 * own, most = a > b ? a : b;
        value = most == -INFINITY ? most : most + log1p(exp(-fabs(a - b)));
      }
    }
    values[k * n + row] = static_cast<T>(value);
  }
}

}  // namespace dpo_kernels

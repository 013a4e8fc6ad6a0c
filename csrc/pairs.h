// Pairs of sequences that DPO's loss compares, as the kernels of every device do; see dpo_kernels/impl/interface.py.
//
// Dimensions: S sequences of T positions, P pairs: sequence b is chosen, and b + P rejected. N labelled rows, those of a
// sequence together. Arithmetic type T of log-probabilities, fp32 or fp64; what is summed, and exponentials, are fp64.
#pragma once

#include <cmath>

#include "positions.h"

namespace dpo_kernels {

// What the log-probabilities of rows go to, and what comes of them; all of type T, dense, but for `weights`.
struct Comparison {
  void* token_logps;  // [S, T]
  int64_t length;
  Positions weights;  // [S, T]; without data all are 1
  void *sums, *slopes;  // [S]
  int64_t* counts;  // [S], of rows
  const void* references;  // [S]
  void *losses, *chosen_rewards, *rejected_rewards;  // [P]
  void* loss;  // []
  double beta;
  int64_t pairs;  // P; 0: sequences are summed alone, and of what comes after `weights` there are sums alone
  int64_t first, stop;  // of the pairs, or of the sequences, whose rows there are

  DPO_HOST_DEVICE int64_t sequences() const { return (pairs > 0 ? 2 : 1) * (stop - first); }
  // The i-th of these.
  DPO_HOST_DEVICE int64_t sequence(int64_t i) const {
    const int64_t s = first + i;
    return s < stop ? s : pairs + s - (stop - first);
  }

  template <class T>
  DPO_HOST_DEVICE T weight(int64_t s, int64_t t) const {
    return weights.data == nullptr ? 1 : weights.at<T>(s, t);
  }

  // L(h) = log(1 + exp(-h)) with h = beta (r_w - r_l) of pair b, and the slopes of the mean. arXiv 2305.18290, Eq. 7.
  template <class T>
  DPO_HOST_DEVICE void compare(int64_t b) const {
    const T *sum = static_cast<const T*>(sums), *reference = static_cast<const T*>(references);
    const T factor = static_cast<T>(beta);
    const T chosen = sum[b] - reference[b], rejected = sum[pairs + b] - reference[pairs + b];
    const double h = factor * (chosen - rejected);
    const T slope = static_cast<T>(-beta / (1 + exp(h)) / static_cast<double>(pairs));
    static_cast<T*>(losses)[b] = static_cast<T>((h < 0 ? -h : 0) + log1p(exp(-fabs(h))));
    static_cast<T*>(chosen_rewards)[b] = factor * chosen;
    static_cast<T*>(rejected_rewards)[b] = factor * rejected;
    static_cast<T*>(slopes)[b] = slope;
    static_cast<T*>(slopes)[pairs + b] = -slope;
  }
};
// N rows, and what each weighs in the mean.
struct PairRows {
  const int64_t *sequence, *position;
  const void* logps;
  void* slopes;
  int64_t n;
};

}  // namespace dpo_kernels

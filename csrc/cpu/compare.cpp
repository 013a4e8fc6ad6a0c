// Pairs of sequences compared, by one thread.
//
// Dimensions: S sequences of T positions, P pairs, N labelled rows.
#include "kernels.h"

namespace dpo_kernels {
namespace {

template <class T>
void compare_as(const Comparison& of, const PairRows& rows) {
  T *const table = static_cast<T*>(of.token_logps), *const sums = static_cast<T*>(of.sums);
  for (int64_t i = 0; i < of.sequences(); ++i) {
    const int64_t s = of.sequence(i);
    sums[s] = 0;
    if (of.pairs > 0) of.counts[s] = 0;
  }
  for (int64_t n = 0; n < rows.n;) {
    const int64_t s = rows.sequence[n], begin = n;
    double sum = 0;
    for (; n < rows.n && rows.sequence[n] == s; ++n) {
      const int64_t t = rows.position[n];
      const T logp = static_cast<const T*>(rows.logps)[n], weighted = logp * of.weight<T>(s, t);
      table[s * of.length + t] = logp;
      sum += weighted;
    }
    sums[s] = static_cast<T>(sum);
    if (of.pairs > 0) of.counts[s] = n - begin;
  }
  if (of.pairs == 0) return;
  for (int64_t b = of.first; b < of.stop; ++b) of.compare<T>(b);
  for (int64_t n = 0; n < rows.n; ++n) {
    const int64_t s = rows.sequence[n];
    static_cast<T*>(rows.slopes)[n] = static_cast<const T*>(of.slopes)[s] * of.weight<T>(s, rows.position[n]);
  }
  if (of.stop < of.pairs) return;
  double sum = 0;
  for (int64_t b = 0; b < of.pairs; ++b) sum += static_cast<const T*>(of.losses)[b];
  *static_cast<T*>(of.loss) = static_cast<T>(sum / static_cast<double>(of.pairs));
}

}  // namespace

void compare(DType type, const Comparison& of, const PairRows& rows) {
  type == DType::f64 ? compare_as<double>(of, rows) : compare_as<float>(of, rows);
}

}  // namespace dpo_kernels

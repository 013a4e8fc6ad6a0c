// The CPU kernels, compiled once for each instruction set by the file that includes this one.
//
// Dimensions: n rows of a tile (N of logits), v vocabulary entries. Storage type S (fp32, fp64, bf16, fp16), arithmetic
// type T (fp32; fp64 for fp64), V a vector of T.
//
// A row is taken in segments that stay in the first-level cache, and each segment twice: for its maximum, then for the
// exponentials. The label's own entry is stepped around, never added and taken away again. Rows are dealt to threads
// whole and each row's sums have a fixed order, so results do not depend on the number of threads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace dpo_kernels {
namespace {

constexpr int64_t kSegment = 2048;
constexpr int kUnroll = 4;

// Entries [first, last) of a row.
struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// Calls body(accumulator, index, count) for each vector of the range: `count` entries from `index` on, the lanes of a
// vector but for the last call. Neighbouring vectors go to different accumulators, which hides latency.
template <int lanes, class Accumulator, class Body>
inline void for_vectors(Range range, Accumulator* accumulators, Body body) {
  int64_t i = range.first;
  for (; i + kUnroll * lanes <= range.last; i += kUnroll * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kUnroll; ++j) body(accumulators[j], i + j * lanes, lanes);
  }
  for (; i + lanes <= range.last; i += lanes) body(accumulators[0], i, lanes);
  if (i < range.last) body(accumulators[1], i, static_cast<int>(range.last - i));
}

// The ranges of a segment beside the label, which is relative to the row.
struct Beside {
  Range ranges[2];
  int count;
  bool has_label;

  Beside(Range segment, int64_t label) {
    has_label = segment.first <= label && label < segment.last;
    ranges[0] = {segment.first, has_label ? label : segment.last};
    ranges[1] = {label + 1, segment.last};
    count = has_label ? 2 : 1;
  }
  bool empty() const { return ranges[0].size() + (has_label ? ranges[1].size() : 0) == 0; }
};

template <class S>
inline typename Arithmetic<S>::V load_some(const S* p, int count) {
  return count == Arithmetic<S>::lanes ? load(p) : load_partial(p, count);
}
template <class S>
inline void store_some(S* p, typename Arithmetic<S>::V x, int count) {
  if (count == Arithmetic<S>::lanes) {
    store(p, x);
  } else {
    store_partial(p, x, count);
  }
}

// One row of products, or of logits where there is nothing to transform (kPlain).
template <class S, bool kPlain>
struct Logits {
  using T = typename Arithmetic<S>::T;
  using V = typename Arithmetic<S>::V;

  const S* a;
  const T* bias;  // or null
  T slope, inward, outward;
  bool has_softcap;

  Logits(const S* row, const void* bias_row, const Transform& t)
      : a(row),
        bias(static_cast<const T*>(bias_row)),
        slope(static_cast<T>(t.slope())),
        inward(t.softcap ? static_cast<T>(t.scale / t.softcap) : 0),
        outward(static_cast<T>(t.softcap / t.temperature)),
        has_softcap(t.softcap != 0) {}

  // a + b
  V biased(int64_t i, int count) const {
    const V x = load_some(a + i, count);
    if (kPlain || !bias) return x;
    return x + load_some(bias + i, count);
  }
  V transformed(V x, V* softcap_slope) const {
    *softcap_slope = broadcast(T(1));
    if (kPlain) return x;
    if (!has_softcap) return x * slope;
    return outward * tanh(x * inward, softcap_slope);
  }
  V operator()(int64_t i, int count, V* softcap_slope) const { return transformed(biased(i, count), softcap_slope); }

  // The same arithmetic for one entry.
  T at(int64_t i, T* softcap_slope) const {
    V s;
    const V z = transformed(biased(i, 1), &s);
    *softcap_slope = static_cast<T>(first_lane(s));
    return static_cast<T>(first_lane(z));
  }

  // The transform is monotonic: the largest logit is that of the largest a + b, or the smallest where it falls.
  T direction() const { return slope < 0 ? T(-1) : T(1); }
};

// A row's state while it is worked on.
struct RowFold {
  double field[kFields];
  int64_t argmax;

  RowFold(const FoldState& s, int64_t row) : argmax(s.argmax[row]) {
    for (int k = 0; k < kFields; ++k) field[k] = s.data[k * s.stride + row];
  }
  void save(const FoldState& s, int64_t row) const {
    for (int k = 0; k < kFields; ++k) s.data[k * s.stride + row] = field[k];
    s.argmax[row] = argmax;
  }
};

// Takes a segment into the fold. Entries are at z.a[i], which is entry `offset` + i of the vocabulary; the label is
// relative to z.a. With kWrite, leaves exp(z - max) * slope in `out`. Returns the rescaling factor.
template <class S, bool kPlain, bool kStats, bool kWrite>
inline double fold_segment(RowFold& fold, const Logits<S, kPlain>& z, Range segment, int64_t label, int64_t offset,
                           S* out) {
  using T = typename Arithmetic<S>::T;
  using V = typename Arithmetic<S>::V;
  constexpr int lanes = Arithmetic<S>::lanes;
  const Beside beside(segment, label);
  double* f = fold.field;
  if (beside.has_label) {
    T label_slope;
    f[kTarget] = z.at(label, &label_slope);
    f[kLabelSlope] = label_slope;
    if (kStats) f[kSumZ] += f[kTarget];
    if (kWrite) store_partial(out + label, broadcast(T(0)), 1);
  }
  if (beside.empty()) return 1;

  const T direction = z.direction(), lowest = static_cast<T>(-INFINITY);
  V maxima[kUnroll];
  for (V& m : maxima) m = broadcast(lowest);
  for (int k = 0; k < beside.count; ++k) {
    for_vectors<lanes>(beside.ranges[k], maxima, [&](V& m, int64_t i, int count) {
      const V u = z.biased(i, count) * direction;
      m = maximum(count == lanes ? u : first_lanes(u, count, lowest), m);
    });
  }
  V top = maximum(maximum(maxima[0], maxima[1]), maximum(maxima[2], maxima[3]));
  const T extreme = static_cast<T>(max_lanes(top));
  V unused;
  const double segment_max = first_lane(z.transformed(broadcast(extreme * direction), &unused));
  const double old_max = f[kMax], new_max = segment_max > old_max ? segment_max : old_max;
  if (kStats && (segment_max > old_max || (segment_max == old_max && fold.argmax < 0))) {
    for (int64_t i = segment.first; i < segment.last; ++i) {
      // by logits, which can be equal where products are not
      if (i != label && first_lane(z(i, 1, &unused)) == segment_max) {
        fold.argmax = offset + i;
        break;
      }
    }
  }

  struct Sums {
    V e, z, ez, sq;
  } sums[kUnroll];
  for (Sums& s : sums) s.e = s.z = s.ez = s.sq = broadcast(T(0));
  const V shift = broadcast(static_cast<T>(new_max));
  for (int k = 0; k < beside.count; ++k) {
    for_vectors<lanes>(beside.ranges[k], sums, [&](Sums& s, int64_t i, int count) {
      V slope;
      const V logit = z(i, count, &slope);
      const V d = logit - shift;
      V e = exp(d);
      if (count != lanes) e = first_lanes(e, count, T(0));
      s.e += e;
      if (kStats) {
        s.z += count == lanes ? logit : first_lanes(logit, count, T(0));
        s.ez += e * maximum(broadcast(T(-1e4)), d);  // exp has reached 0 long before, and 0 * -inf is to be 0
        s.sq += e * e;
      }
      if (kWrite) store_some(out + i, kPlain ? e : e * slope, count);
    });
  }
  const double rescale = ::exp(old_max - new_max);
  if (kStats) {
    // At first old_max is the least number there is, and 0 times the difference is to be 0.
    const double fall = old_max - new_max < -1e4 ? -1e4 : old_max - new_max;
    double sum_z = 0, sum_ez = 0, sum_sq = 0;
    for (const Sums& s : sums) {
      sum_z += sum_lanes(s.z);
      sum_ez += sum_lanes(s.ez);
      sum_sq += sum_lanes(s.sq);
    }
    f[kSumZ] += sum_z;
    f[kSumEz] = (f[kSumEz] + f[kSum] * fall) * rescale + sum_ez;
    f[kSumSq] = f[kSumSq] * rescale * rescale + sum_sq;
  }
  double sum = 0;
  for (const Sums& s : sums) sum += sum_lanes(s.e);
  f[kSum] = f[kSum] * rescale + sum;
  f[kMax] = new_max;
  return rescale;
}

// Writes -g p dz/da over a segment, from z to out, and at the label `label_entry`.
template <class S, bool kPlain>
inline void dlogits_segment(const Logits<S, kPlain>& z, S* out, Range segment, int64_t label,
                            typename Arithmetic<S>::T shift, typename Arithmetic<S>::T factor,
                            typename Arithmetic<S>::T label_entry) {
  using T = typename Arithmetic<S>::T;
  using V = typename Arithmetic<S>::V;
  constexpr int lanes = Arithmetic<S>::lanes;
  const Beside beside(segment, label);
  struct Nothing {
  } nothing[kUnroll];
  for (int k = 0; k < beside.count; ++k) {
    for_vectors<lanes>(beside.ranges[k], nothing, [&](Nothing&, int64_t i, int count) {
      V slope;
      const V logit = z(i, count, &slope);
      const V p = exp(logit - shift) * factor;
      store_some(out + i, kPlain ? p : p * slope, count);
    });
  }
  if (beside.has_label) store_partial(out + label, broadcast(T(label_entry)), 1);
}

// Calls body(row) for all rows, each in one thread.
template <class Body>
inline void for_rows(int64_t n, int threads, const Body& body) {
  struct Work {
    int64_t n;
    const Body* body;
  } work{n, &body};
  run_team(
      [](void* data, int rank, int size) {
        const Work& w = *static_cast<const Work*>(data);
        for (int64_t row = w.n * rank / size; row < w.n * (rank + 1) / size; ++row) (*w.body)(row);
      },
      &work, n < threads ? static_cast<int>(n) : threads);
}

template <class Body>
inline void for_segments(int64_t v, const Body& body) {
  for (int64_t first = 0; first < v; first += kSegment) body(Range{first, first + kSegment < v ? first + kSegment : v});
}

template <class T, bool kPlain, bool kStats>
void fold_tile(const Tile& tile, const FoldState& state, T* rescale, int threads) {
  for_rows(tile.n, threads, [&](int64_t row) {
    T* a = static_cast<T*>(tile.a) + row * tile.v;
    const int64_t label = tile.y[row] - tile.start;
    const Logits<T, kPlain> z(a, tile.bias, tile.transform);
    RowFold fold(state, row);
    if (rescale) {
      // What is written refers to one maximum: the segment is the whole row of the tile.
      rescale[row] =
          static_cast<T>(fold_segment<T, kPlain, kStats, true>(fold, z, {0, tile.v}, label, tile.start, a));
    } else {
      for_segments(tile.v, [&](Range segment) {
        fold_segment<T, kPlain, kStats, false>(fold, z, segment, label, tile.start, nullptr);
      });
    }
    fold.save(state, row);
  });
}

template <class T>
void fold_tile(const Tile& tile, const FoldState& state, T* rescale, bool stats, int threads) {
  const bool plain = tile.transform.is_identity() && !tile.bias;
  const auto kernel = plain ? (stats ? fold_tile<T, true, true> : fold_tile<T, true, false>)
                            : (stats ? fold_tile<T, false, true> : fold_tile<T, false, false>);
  kernel(tile, state, rescale, threads);
}

void fold(DType dtype, const Tile& tile, const FoldState& state, void* rescale, bool stats, int threads) {
  if (dtype == DType::f64) {
    fold_tile(tile, state, static_cast<double*>(rescale), stats, threads);
  } else {
    fold_tile(tile, state, static_cast<float*>(rescale), stats, threads);
  }
}

template <class T, bool kPlain>
void dlogits_tile(const Tile& tile, T* out, const T* norm, int64_t norm_stride, const T* logp, const T* g, T* value,
                  int threads) {
  const double slope = tile.transform.slope();
  for_rows(tile.n, threads, [&](int64_t row) {
    const int64_t label = tile.y[row] - tile.start;
    const Logits<T, kPlain> z(static_cast<const T*>(tile.a) + row * tile.v, tile.bias, tile.transform);
    T* out_row = out + row * tile.v;
    T label_slope = 0;
    if (0 <= label && label < tile.v) z.at(label, &label_slope);
    value[row] = static_cast<T>(-::expm1(logp[row]) * g[row] * slope * label_slope);
    const T factor = static_cast<T>(-slope * g[row] / norm[norm_stride + row]);
    for_segments(tile.v, [&](Range segment) { dlogits_segment(z, out_row, segment, label, norm[row], factor, T(0)); });
  });
}

template <class T>
void dlogits_tile(const Tile& tile, void* out, const void* norm, int64_t norm_stride, const void* logp, const void* g,
                  void* value, int threads) {
  const bool plain = tile.transform.is_identity() && !tile.bias;
  (plain ? dlogits_tile<T, true> : dlogits_tile<T, false>)(
      tile, static_cast<T*>(out), static_cast<const T*>(norm), norm_stride, static_cast<const T*>(logp),
      static_cast<const T*>(g), static_cast<T*>(value), threads);
}

void dlogits(DType dtype, const Tile& tile, void* out, const void* norm, int64_t norm_stride, const void* logp,
             const void* g, void* value, int threads) {
  const auto kernel = dtype == DType::f64 ? dlogits_tile<double> : dlogits_tile<float>;
  kernel(tile, out, norm, norm_stride, logp, g, value, threads);
}

constexpr Transform kIdentity{1, 0, 1};

// A row of logits of any stride: body(segment's entries, its range from 0 on, its first entry). Entries that do not lie
// side by side are copied together first.
template <class S, class Body>
inline void for_logits_segments(const LogitsRows& logits, int64_t sequence, int64_t position, int64_t v,
                                const Body& body) {
  const S* row = static_cast<const S*>(logits.data) + sequence * logits.stride_s + position * logits.stride_t;
  for_segments(v, [&](Range segment) {
    if (logits.stride_v == 1) {
      body(row + segment.first, Range{0, segment.size()}, segment.first);
    } else {
      S buffer[kSegment];
      for (int64_t i = 0; i < segment.size(); ++i) buffer[i] = row[(segment.first + i) * logits.stride_v];
      body(static_cast<const S*>(buffer), Range{0, segment.size()}, segment.first);
    }
  });
}

template <class S, bool kStats>
void fold_logits(const LogitsRows& logits, const Rows& rows, const FoldState& state, int threads) {
  for_rows(rows.n, threads, [&](int64_t row) {
    RowFold fold(state, row);
    for_logits_segments<S>(logits, rows.sequence[row], rows.position[row], rows.v,
                           [&](const S* entries, Range segment, int64_t first) {
                             fold_segment<S, true, kStats, false>(fold, Logits<S, true>(entries, nullptr, kIdentity),
                                                                  segment, rows.y[row] - first, first, nullptr);
                           });
    fold.save(state, row);
  });
}

void logits_fold(DType dtype, const LogitsRows& logits, const Rows& rows, const FoldState& state, bool stats,
                 int threads) {
  switch (dtype) {
    case DType::f32:
      return (stats ? fold_logits<float, true> : fold_logits<float, false>)(logits, rows, state, threads);
    case DType::f64:
      return (stats ? fold_logits<double, true> : fold_logits<double, false>)(logits, rows, state, threads);
    case DType::bf16:
      return (stats ? fold_logits<BFloat16, true> : fold_logits<BFloat16, false>)(logits, rows, state, threads);
    case DType::f16:
      return (stats ? fold_logits<Half, true> : fold_logits<Half, false>)(logits, rows, state, threads);
  }
}

template <class S>
void bwd_logits(const LogitsRows& logits, const LogitsRows& out, const Rows& rows, const void* norm,
                int64_t norm_stride, const void* logp, const void* g, int threads) {
  using T = typename Arithmetic<S>::T;
  const T *shift = static_cast<const T*>(norm), *sum = shift + norm_stride;
  for_rows(rows.n, threads, [&](int64_t row) {
    const T weight = static_cast<const T*>(g)[row];
    const T label_entry = static_cast<T>(-::expm1(static_cast<const T*>(logp)[row]) * weight);
    S* out_row = static_cast<S*>(out.data) + rows.sequence[row] * out.stride_s + rows.position[row] * out.stride_t;
    for_logits_segments<S>(
        logits, rows.sequence[row], rows.position[row], rows.v,
        [&](const S* entries, Range segment, int64_t first) {
          S buffer[kSegment];
          S* to = out.stride_v == 1 ? out_row + first : buffer;
          dlogits_segment(Logits<S, true>(entries, nullptr, kIdentity), to, segment, rows.y[row] - first, shift[row],
                          static_cast<T>(-weight / sum[row]), label_entry);
          if (to == buffer) {
            for (int64_t i = 0; i < segment.size(); ++i) out_row[(first + i) * out.stride_v] = buffer[i];
          }
        });
  });
}

void logits_bwd(DType dtype, const LogitsRows& logits, const LogitsRows& out, const Rows& rows, const void* norm,
                int64_t norm_stride, const void* logp, const void* g, int threads) {
  switch (dtype) {
    case DType::f32:
      return bwd_logits<float>(logits, out, rows, norm, norm_stride, logp, g, threads);
    case DType::f64:
      return bwd_logits<double>(logits, out, rows, norm, norm_stride, logp, g, threads);
    case DType::bf16:
      return bwd_logits<BFloat16>(logits, out, rows, norm, norm_stride, logp, g, threads);
    case DType::f16:
      return bwd_logits<Half>(logits, out, rows, norm, norm_stride, logp, g, threads);
  }
}

void finish(DType dtype, const FoldState& state, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, int threads) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    const Finished<T> finished{static_cast<T*>(logp), static_cast<T*>(norm), static_cast<T*>(values), n, v, stats};
    for_rows(n, threads, [&](int64_t row) { finished.write(row, row_sums(state, row, y[row])); });
  };
  dtype == DType::f64 ? with(double()) : with(float());
}

// Squares of registers, because columns a power of two apart would evict each other from the cache. Four side by side
// use what a row's page was opened for, and the rows after the next ones are asked for ahead.
void transpose(const float* a, float* out, int64_t n, int64_t v, int threads) {
  constexpr int64_t width = 4 * kLanes;
  for_rows((v + width - 1) / width, threads, [&](int64_t strip) {
    const int64_t first = strip * width, last = first + width < v ? first + width : v;
    for (int64_t row = 0; row < n; row += kLanes) {
      const int rows = static_cast<int>(n - row < kLanes ? n - row : kLanes);
      for (int64_t ahead = row + kLanes; ahead < row + 2 * kLanes && ahead < n; ++ahead) {
        for (int64_t column = first; column < last; column += 16) __builtin_prefetch(a + ahead * v + column);
      }
      for (int64_t column = first; column < last; column += kLanes) {
        const int columns = static_cast<int>(last - column < kLanes ? last - column : kLanes);
        F32 square[kLanes] = {};
        for (int i = 0; i < rows; ++i) square[i] = load_some(a + (row + i) * v + column, columns);
        transpose_square(square);
        for (int j = 0; j < columns; ++j) store_some(out + (column + j) * n + row, square[j], rows);
      }
    }
  });
}

void exp_all(float* x, int64_t n) {
  int nothing[kUnroll];
  for_vectors<kLanes>({0, n}, nothing, [&](int&, int64_t i, int count) {
    store_some(x + i, exp(load_some(x + i, count)), count);
  });
}

void tanh_all(float* x, float* slope, int64_t n) {
  int nothing[kUnroll];
  for_vectors<kLanes>({0, n}, nothing, [&](int&, int64_t i, int count) {
    F32 s;
    store_some(x + i, tanh(load_some(x + i, count), &s), count);
    store_some(slope + i, s, count);
  });
}

constexpr Kernels make_kernels(const char* name) {
  return {name, fold, dlogits, logits_fold, logits_bwd, finish, transpose, exp_all, tanh_all};
}

}  // namespace
}  // namespace dpo_kernels

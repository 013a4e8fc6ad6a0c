// Kernels that read each row of logits once and write it at most once: the tiles of paths A to D, and path E.
//
// Dimensions: n rows of a tile, or N = S T positions of logits; v vocabulary entries. Storage type S of what is read, O
// of what is written, arithmetic type T (fp32; fp64 for fp64).
//
// A block has a row, or in the backward from logits a part of one; see row.cuh. Sums have one order: no atomics.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "math.cuh"
#include "row.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// Makes logits of x.W, and says what the softcap's part of dz/da is.
template <class T>
struct Entries {
  const T* bias;  // or null
  Logit<T> logit;
  int64_t start;
  const int64_t* y;

  template <int kCount>
  __device__ __forceinline__ void operator()(T (&a)[kCount], int i, T (&slope)[kCount]) const {
    if (bias != nullptr) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) a[k] += bias[i + k];
    }
    if (logit.capped) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) a[k] = logit.outer * tanh_of(a[k] * logit.inner, slope[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) a[k] *= logit.outer, slope[k] = 1;
    }
  }
};

// Logits that are what they are.
template <class T>
struct PlainEntries {
  template <int kCount>
  __device__ __forceinline__ void operator()(T (&)[kCount], int, T (&slope)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) slope[k] = 1;
  }
};

// The label's place among the v entries, or -1.
__device__ __forceinline__ int label_among(int64_t label, int v) {
  return label >= 0 && label < v ? static_cast<int>(label) : -1;
}

// What one thread has seen of a row, beside the label and above the least: sums of e = power(shift.exponent(z)), of z,
// e shift.exponent(z) and e^2.
template <class T, bool kStats>
struct ThreadFold {
  T top;
  Shift<T> shift;
  T sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0;
  int argmax = -1;

  __device__ __forceinline__ ThreadFold(T least, T unit) : top(least), shift(least, unit) {}

  // i: the index of the first. What is not to count is -inf.
  template <int kCount>
  __device__ __forceinline__ void add(const T (&z)[kCount], int i) {
    T block = z[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) block = larger(block, z[k]);
    if (kStats && (block > top || (block == top && argmax < 0))) {
#pragma unroll
      for (int k = kCount - 1; k >= 0; --k) argmax = z[k] == block ? i + k : argmax;
    }
    top = larger(top, block);
    const T before = shift.by;
    shift = Shift<T>(top, shift.unit);
    const T change = before - shift.by, rescale = power(change);
    if (kStats) {
      sum_ez = (sum_ez + sum * larger(change, T(-1e4))) * rescale;
      sum_sq *= rescale * rescale;
    }
    sum *= rescale;
    T part[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const T exponent = shift.exponent(z[k]), e = power(exponent);
      part[k % 2] += e;
      if (kStats) {
        // a power has reached 0 long before -1e4, and 0 times -inf is to be 0
        sum_ez += e * larger(exponent, T(-1e4));
        sum_sq += e * e;
      }
    }
    sum += part[0] + part[1];
  }
};

// What a block has found of a row beside the label: the maximum, the sum of exp(z - max), those of the statistics, and
// where the maximum is, or INT_MAX.
template <class T>
struct RowFold {
  T top;
  double sum, sum_z, sum_ez, sum_sq;
  int argmax;
};

// By a thread of a block that goes through all of it, from left to right: so it finds the first of equal maxima.
template <bool kStats, class S, class Of, class T>
__device__ __forceinline__ void add_row(const Row<S>& row, const Of& of, int label, ThreadFold<T, kStats>& fold) {
  const auto add = [&](const auto& pack, int i) {
    constexpr int count = sizeof(pack) / sizeof(S);
    T z[count], slope[count];
    widen_all(pack, z);
    of(z, i, slope);
    if (kStats) {
#pragma unroll
      for (int k = 0; k < count; ++k) fold.sum_z += z[k];
    }
    if (label >= i && label < i + count) {
#pragma unroll
      for (int k = 0; k < count; ++k) z[k] = i + k == label ? T(-INFINITY) : z[k];
    }
    fold.add(z, i);
  };
  const int head = row.head(), packs = row.packs();
  const auto* from = reinterpret_cast<const Pack<S, kPer<S>>*>(row.data + head);
  for (int i = threadIdx.x; i < head; i += kThreads) add(Pack<S, 1>{row[i]}, i);
  int p = threadIdx.x;
  for (; p + (kUnroll - 1) * kThreads < packs; p += kUnroll * kThreads) {
    Pack<S, kPer<S>> read[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) read[j] = from[p + j * kThreads];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) add(read[j], head + (p + j * kThreads) * kPer<S>);
  }
  for (; p < packs; p += kThreads) add(from[p], head + p * kPer<S>);
  for (int i = head + packs * kPer<S> + threadIdx.x; i < row.v; i += kThreads) add(Pack<S, 1>{row[i]}, i);
}

template <bool kStats, class S, class Of>
__device__ __forceinline__ auto fold_row(const Row<S>& row, const Of& of, int label) {
  using T = typename Accumulate<S>::T;
  __shared__ T shared_top[kWarps];
  __shared__ double shared_sum[kWarps];
  __shared__ int shared_index[kWarps];
  ThreadFold<T, kStats> fold(-kHuge<T>, kUnit<T>);
  add_row(row, of, label, fold);
  RowFold<T> found{};
  found.top = over_block(fold.top, shared_top, larger<T>);
  if (unit_of(found.top) != fold.shift.unit) {  // of huge logits, as where all are masked
    fold = ThreadFold<T, kStats>(T(-FLT_MAX), T(1));
    add_row(row, of, label, fold);
    found.top = over_block(fold.top, shared_top, larger<T>);
  }

  const auto plus = [](double a, double b) { return a + b; };
  const T rest = fold.shift.exponent(fold.top);
  const double factor = exp_of(fold.top - found.top) * power(-rest), apart = static_cast<double>(fold.top) - found.top;
  found.sum = over_block(fold.sum * factor, shared_sum, plus);
  if (kStats) {
    found.sum_z = over_block(static_cast<double>(fold.sum_z), shared_sum, plus);
    const double sum_ez = (fold.sum_ez - static_cast<double>(fold.sum) * rest) / fold.shift.unit;
    found.sum_ez = over_block((sum_ez + fold.sum * apart) * factor, shared_sum, plus);
    found.sum_sq = over_block(fold.sum_sq * factor * factor, shared_sum, plus);
    const int mine = fold.top == found.top && fold.argmax >= 0 ? fold.argmax : INT_MAX;
    found.argmax = over_block(mine, shared_index, [](int a, int b) { return a < b ? a : b; });
  }
  return found;
}

// With kSums: writes exponentials to `out`, and brings `sums` to the new maximum.
template <class S, class O, bool kStats, bool kSums>
__global__ void __launch_bounds__(kThreads, kStats || sizeof(S) == 8 ? 2 : 4)
    fold_kernel(TileRows<S> rows, Entries<S> of, FoldState state, TileRows<O> out, TileRows<S> sums) {
  const int64_t n = blockIdx.x;
  const Row<S> row = rows[n];
  const int label = label_among(of.y[n] - of.start, row.v);
  S target[1] = {0}, label_slope[1] = {1};
  if (threadIdx.x == 0 && label >= 0) {  // now: `out` may be what is read
    target[0] = row[label];
    of(target, label, label_slope);
  }
  const auto [top, sum, sum_z, sum_ez, sum_sq, argmax] = fold_row<kStats>(row, of, label);

  if (!kSums && threadIdx.x != 0) return;
  double* field = state.data + n;
  const double old_max = field[kMax * state.stride], new_max = top > old_max ? top : old_max;
  const double old_factor = exp(old_max - new_max), new_factor = exp(top - new_max);
  if constexpr (kSums) {
    const S shift = static_cast<S>(new_max), factor = static_cast<S>(old_factor);
    map_row(row, out[n], 0, 1, [&](auto& x, int i) {
      constexpr int count = sizeof(x) / sizeof(S);
      S slope[count];
      of(x, i, slope);
#pragma unroll
      for (int k = 0; k < count; ++k) x[k] = i + k == label ? 0 : exp_of(x[k] - shift) * slope[k];
    });
    if (factor != 1) {  // which gets rarer with every tile
      map_row(sums[n], sums[n], 0, 1, [&](auto& x, int) {
#pragma unroll
        for (S& sum : x) sum *= factor;
      });
    }
    __syncthreads();  // all have read the old maximum
  }
  if (threadIdx.x != 0) return;
  if (label >= 0) {
    field[kTarget * state.stride] = target[0];
    field[kLabelSlope * state.stride] = label_slope[0];
  }
  const double old_sum = field[kSum * state.stride];
  field[kMax * state.stride] = new_max;
  field[kSum * state.stride] = old_sum * old_factor + sum * new_factor;
  if (kStats) {
    double &z = field[kSumZ * state.stride], &ez = field[kSumEz * state.stride], &sq = field[kSumSq * state.stride];
    z += sum_z;
    ez = (ez + old_sum * (old_max - new_max)) * old_factor + (sum_ez + sum * (top - new_max)) * new_factor;
    sq = sq * old_factor * old_factor + sum_sq * new_factor * new_factor;
    const bool is_new = top > old_max || (top == old_max && state.argmax[n] < 0);
    if (is_new && argmax != INT_MAX) state.argmax[n] = of.start + argmax;
  }
}

// 0 at the label, whose entry goes to `value`.
template <class S, class O>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4)
    dlogits_kernel(TileRows<S> rows, TileRows<O> out, Entries<S> of, const S* norm, int64_t norm_stride, const S* logp,
                   const S* g, S slope_at_0, S* value) {
  const int64_t n = blockIdx.x;
  const Row<S> row = rows[n];
  const int label = label_among(of.y[n] - of.start, row.v);
  const S shift = norm[n], weight = g[n] * slope_at_0, factor = -weight / norm[norm_stride + n];
  const S own = -expm1(logp[n]) * weight;
  if (label < 0 && threadIdx.x == 0) value[n] = 0;
  map_row(row, out[n], 0, 1, [&](auto& x, int i) {
    constexpr int count = sizeof(x) / sizeof(S);
    S slope[count];
    of(x, i, slope);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      x[k] = exp_of(x[k] - shift) * factor * slope[k];
      if (i + k != label) continue;
      value[n] = own * slope[k];
      x[k] = 0;
    }
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(TileRows<S> rows, int64_t n, const typename Accumulate<S>::T* factor) {
  using T = typename Accumulate<S>::T;
  const T by = *factor;
  if (by == 1) return;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    map_row(rows[i], rows[i], 0, 1, [by](auto& x, int) {
      for (T& each : x) each *= by;
    });
  }
}

// One thread a row.
template <class T>
__global__ void finish_kernel(FoldState state, const int64_t* y, Finished<T> finished) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < finished.n) finished.write(row, row_sums(state, row, y[row]));
}

// Sequence and place in it of position n.
struct Position {
  int64_t s, t;
};
__device__ __forceinline__ Position position_of(const Labels& labels, int n) {
  const int length = static_cast<int>(labels.length);  // divided by in few instructions
  return {n / length, n % length};
}

template <class S>
__device__ __forceinline__ Row<S> row_of(const LogitsRows& logits, int64_t s, int64_t t, int v) {
  return {static_cast<S*>(logits.data) + s * logits.stride_s + t * logits.stride_t, logits.stride_v, v};
}

// By a block: whether all labels are among the v entries, and as many as they should be.
__device__ void check_labels(const Labels& labels, int v, int64_t num_labelled, int* fit) {
  __shared__ int64_t shared_count[kWarps];
  int64_t labelled = 0, outside = 0;
  for (int n = threadIdx.x; n < labels.count(); n += kThreads) {
    const auto [s, t] = position_of(labels, n);
    const int64_t y = labels.at(s, t);
    if (y == labels.ignore_index) continue;
    ++labelled;
    outside += y < 0 || y >= v;
  }
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  labelled = over_block(labelled, shared_count, plus);
  outside = over_block(outside, shared_count, plus);
  if (threadIdx.x == 0) *fit = outside == 0 && (num_labelled < 0 || labelled == num_labelled);
}

// The first block looks whether labels fit; each other one has a position, of which it reads nothing if it is ignored.
template <class S, bool kStats, class T = typename Accumulate<S>::T>
__global__ void __launch_bounds__(kThreads, kStats || sizeof(S) == 8 ? 2 : 4)
    logits_fwd_kernel(LogitsRows logits, Labels labels, int64_t num_labelled, Finished<T> finished, int* fit) {
  const int v = static_cast<int>(finished.v);
  if (blockIdx.x == 0) return check_labels(labels, v, num_labelled, fit);
  const int n = blockIdx.x - 1;
  const auto [s, t] = position_of(labels, n);
  const int64_t y = labels.at(s, t);
  if (y == labels.ignore_index) {
    if (threadIdx.x == 0) finished.write_zeros(n);
    return;
  }
  const Row<S> row = row_of<S>(logits, s, t, v);
  const int label = label_among(y, v);
  const T target = threadIdx.x == 0 && label >= 0 ? widen(row[label]) : -INFINITY;
  const RowFold<T> found = fold_row<kStats>(row, PlainEntries<T>(), label);
  if (threadIdx.x != 0) return;
  finished.write(n, {found.top, found.top, target, found.sum, found.sum_z, found.sum_ez, found.sum_sq,
                     label < found.argmax});
}

// Zeros where there is no label, of which no logit is read.
template <class S, class T = typename Accumulate<S>::T>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4)
    logits_bwd_kernel(LogitsRows logits, LogitsRows out, Labels labels, int v, const T* norm, const T* logp,
                      Positions g) {
  const int n = blockIdx.x;
  const auto [s, t] = position_of(labels, n);
  const int64_t count = labels.count(), y = labels.at(s, t);
  const Row<S> to = row_of<S>(out, s, t, v);
  if (y == labels.ignore_index) return fill_row(to, S{}, blockIdx.y, gridDim.y);
  const int label = label_among(y, v);
  const T shift = norm[n], weight = g.at<T>(s, t), factor = -weight / norm[count + n];
  const T own = -expm1(logp[n]) * weight;
  map_row(row_of<S>(logits, s, t, v), to, blockIdx.y, gridDim.y, [&](auto& x, int i) {
    constexpr int width = sizeof(x) / sizeof(T);
#pragma unroll
    for (int k = 0; k < width; ++k) x[k] = i + k == label ? own : exp_of(x[k] - shift) * factor;
  });
}

template <class Launch>
void for_type(DType type, Launch launch) {
  switch (type) {
    case DType::f32:
      return launch(float());
    case DType::f64:
      return launch(double());
    case DType::bf16:
      return launch(__nv_bfloat16());
    case DType::f16:
      return launch(__half());
  }
}

int entries(int64_t v) {
  if (v > INT_MAX / 2)
    throw std::invalid_argument("v: expected at most 2^30 vocabulary entries, got " + std::to_string(v));
  return static_cast<int>(v);
}

// Blocks that share a row of v entries of type S in dlogits_kernel.
template <class S>
int64_t blocks_of(int64_t v) {
  constexpr int64_t chunk = int64_t{kThreads} * kUnroll * kPer<S>;
  return (v + chunk - 1) / chunk;
}

template <class S>
TileRows<S> tile_rows(void* data, int64_t stride, int64_t columns) {
  return {static_cast<S*>(data), stride, entries(columns)};
}

template <class S>
Entries<S> entries_of(const Tile& tile) {
  return {static_cast<const S*>(tile.bias), Logit<S>(tile.transform), tile.start, tile.y};
}

template <class S, class O>
void fold_tile(const Tile& tile, const FoldState& state, const Matrix& out, const Matrix& sums, bool stats,
               cudaStream_t stream) {
  const auto rows = tile_rows<S>(tile.a, tile.v, tile.v);
  if (sums.data == nullptr) {
    run(stats ? fold_kernel<S, S, true, false> : fold_kernel<S, S, false, false>, tile.n, 1, stream, rows,
        entries_of<S>(tile), state, TileRows<S>{}, TileRows<S>{});
  } else {
    run(stats ? fold_kernel<S, O, true, true> : fold_kernel<S, O, false, true>, tile.n, 1, stream, rows,
        entries_of<S>(tile), state, tile_rows<O>(out.data, out.stride, tile.v),
        tile_rows<S>(sums.data, sums.stride, sums.columns));
  }
}

template <class S, class O>
void dlogits_tile(const Tile& tile, const Matrix& out, const GradRows& grad, void* value, cudaStream_t stream) {
  run(dlogits_kernel<S, O>, tile.n, 1, stream, tile_rows<S>(tile.a, tile.v, tile.v),
      tile_rows<O>(out.data, out.stride, tile.v), entries_of<S>(tile), static_cast<const S*>(grad.norm),
      grad.norm_stride, static_cast<const S*>(grad.logp), static_cast<const S*>(grad.g),
      static_cast<S>(tile.transform.slope()), static_cast<S*>(value));
}

// A tile is of fp32, written in any type but fp64, or all of it is fp64.
template <class Launch>
void for_tile(DType type, DType out_type, Launch launch) {
  if (type != (out_type == DType::f64 ? DType::f64 : DType::f32)) {
    throw std::invalid_argument("out: expected fp64 for a tile of fp64, or fp32, bf16 or fp16 for one of fp32");
  }
  for_type(out_type, [&](auto o) { launch(typename Accumulate<decltype(o)>::T(), o); });
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

void fold(DType type, const Tile& tile, const FoldState& state, DType out_type, const Matrix& out, const Matrix& sums,
          bool stats, cudaStream_t stream) {
  for_tile(type, out_type,
           [&](auto s, auto o) { fold_tile<decltype(s), decltype(o)>(tile, state, out, sums, stats, stream); });
}

void dlogits(DType type, const Tile& tile, DType out_type, const Matrix& out, const GradRows& grad, void* value,
             cudaStream_t stream) {
  for_tile(type, out_type,
           [&](auto s, auto o) { dlogits_tile<decltype(s), decltype(o)>(tile, out, grad, value, stream); });
}

void logits_fwd(DType type, const LogitsRows& logits, const Labels& labels, int64_t v, int64_t num_labelled,
                const Stats& stats, void* logp, void* norm, void* values, int* fit, cudaStream_t stream) {
  for_type(type, [&](auto s) {
    using S = decltype(s);
    using T = typename Accumulate<S>::T;
    const Finished<T> finished{static_cast<T*>(logp), static_cast<T*>(norm), static_cast<T*>(values),
                               labels.count(),        entries(v),            stats};
    run(stats.count != 0 ? logits_fwd_kernel<S, true> : logits_fwd_kernel<S, false>, 1 + labels.count(), 1, stream,
        logits, labels, num_labelled, finished, fit);
  });
}

void logits_bwd(DType type, const LogitsRows& logits, const LogitsRows& out, const Labels& labels, int64_t v,
                const void* norm, const void* logp, const Positions& g, cudaStream_t stream) {
  for_type(type, [&](auto s) {
    using S = decltype(s);
    using T = typename Accumulate<S>::T;
    run(logits_bwd_kernel<S>, labels.count(), blocks_of<S>(v), stream, logits, out, labels, entries(v),
        static_cast<const T*>(norm), static_cast<const T*>(logp), g);
  });
}

// Blocks stay and go from row to row: most often there is nothing to do, for none of them.
void scale(DType type, const Matrix& rows, const void* factor, cudaStream_t stream) {
  for_type(type, [&](auto s) {
    using S = decltype(s);
    run(scale_kernel<S>, std::min<int64_t>(rows.rows, 2048), 1, stream,
        TileRows<S>{static_cast<S*>(rows.data), rows.stride, static_cast<int>(rows.columns)}, rows.rows,
        static_cast<const typename Accumulate<S>::T*>(factor));
  });
}

void finish(DType type, const FoldState& state, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, cudaStream_t stream) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    run(finish_kernel<T>, (n + kThreads - 1) / kThreads, 1, stream, state, y,
        Finished<T>{static_cast<T*>(logp), static_cast<T*>(norm), static_cast<T*>(values), n, v, stats});
  };
  type == DType::f64 ? with(double()) : with(float());
}

}  // namespace dpo_kernels::cuda

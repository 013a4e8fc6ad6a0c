// Kernels that read each row of logits once and write it at most once: the tiles of paths A to D, and path E.
//
// Dimensions: n rows of a tile (N of logits), v vocabulary entries. Storage type S of what is read, O of what is
// written, arithmetic type T (fp32; fp64 for fp64).
//
// A block has a row, or in the backward from logits a part of one; see row.cuh. Sums have one order: no atomics.
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
  const int64_t* y;
  static constexpr int64_t start = 0;

  template <int kCount>
  __device__ __forceinline__ void operator()(T (&)[kCount], int, T (&slope)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) slope[k] = 1;
  }
};

// The label's place among the v entries, or -1.
template <class Of>
__device__ __forceinline__ int label_of(const Of& of, int64_t n, int v) {
  const int64_t label = of.y[n] - of.start;
  return label >= 0 && label < v ? static_cast<int>(label) : -1;
}

// What one thread has seen of a row, beside the label.
template <class T, bool kStats>
struct ThreadFold {
  // finite, so that entries of -inf alone leave no inf - inf
  T top = -FLT_MAX, sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0;
  int argmax = -1;

  // i: the index of the first. What is not to count is -inf.
  template <int kCount>
  __device__ __forceinline__ void add(const T (&z)[kCount], int i) {
    T block = z[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) block = larger(block, z[k]);
    const T next = larger(top, block), rescale = exp_of(top - next);
    if (kStats) {
      if (block > top) {
#pragma unroll
        for (int k = kCount - 1; k >= 0; --k) argmax = z[k] == block ? i + k : argmax;
      }
      sum_ez = (sum_ez + sum * larger(top - next, T(-1e4))) * rescale;
      sum_sq *= rescale * rescale;
    }
    sum *= rescale;
    top = next;
    T part[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const T shifted = z[k] - next, e = exp_of(shifted);
      part[k % 2] += e;
      if (kStats) {
        // exp has reached 0 long before -1e4, and 0 times -inf is to be 0
        sum_ez += e * larger(shifted, T(-1e4));
        sum_sq += e * e;
      }
    }
    sum += part[0] + part[1];
  }
};

// With kSums: writes exponentials to `out`, and brings `sums` to the new maximum.
template <class S, class O, class Rows, class Of, bool kStats, bool kSums>
__global__ void __launch_bounds__(kThreads, kStats || sizeof(S) == 8 ? 2 : 4)
    fold_kernel(Rows rows, Of of, FoldState state, TileRows<O> out, TileRows<typename Accumulate<S>::T> sums) {
  using T = typename Accumulate<S>::T;
  __shared__ T shared_top[kWarps];
  __shared__ double shared_sum[kWarps];
  __shared__ int shared_index[kWarps];
  const int64_t n = blockIdx.x;
  const Row<S> row = rows[n];
  const int label = label_of(of, n, row.v);
  T target[1] = {0}, label_slope[1] = {1};
  if (threadIdx.x == 0 && label >= 0) {  // now: `out` may be what is read
    target[0] = widen(row[label]);
    of(target, label, label_slope);
  }

  // Each thread goes from left to right, so that it finds the first of equal maxima.
  ThreadFold<T, kStats> fold;
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

  const T top = over_block(fold.top, shared_top, larger<T>);
  const auto plus = [](double a, double b) { return a + b; };
  const double factor = exp_of(fold.top - top), apart = static_cast<double>(fold.top) - top;
  const double sum = over_block(fold.sum * factor, shared_sum, plus);
  double sum_z = 0, sum_ez = 0, sum_sq = 0;
  int argmax = INT_MAX;
  if (kStats) {
    sum_z = over_block(static_cast<double>(fold.sum_z), shared_sum, plus);
    sum_ez = over_block((fold.sum_ez + fold.sum * apart) * factor, shared_sum, plus);
    sum_sq = over_block(fold.sum_sq * factor * factor, shared_sum, plus);
    const int mine = fold.top == top && fold.argmax >= 0 ? fold.argmax : INT_MAX;
    argmax = over_block(mine, shared_index, [](int a, int b) { return a < b ? a : b; });
  }

  if (!kSums && threadIdx.x != 0) return;
  double* field = state.data + n;
  const double old_max = field[kMax * state.stride], new_max = top > old_max ? top : old_max;
  const double old_factor = exp(old_max - new_max), new_factor = exp(top - new_max);
  if constexpr (kSums) {
    const T shift = static_cast<T>(new_max), factor = static_cast<T>(old_factor);
    map_row(row, out[n], 0, 1, [&](auto& x, int i) {
      constexpr int count = sizeof(x) / sizeof(T);
      T slope[count];
      of(x, i, slope);
#pragma unroll
      for (int k = 0; k < count; ++k) x[k] = i + k == label ? 0 : exp_of(x[k] - shift) * slope[k];
    });
    if (factor != 1) {  // which gets rarer with every tile
      map_row(sums[n], sums[n], 0, 1, [&](auto& x, int) {
#pragma unroll
        for (T& sum : x) sum *= factor;
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
    if (top > old_max && argmax != INT_MAX) state.argmax[n] = of.start + argmax;
  }
}

// With `value`: 0 at the label, whose entry goes there. Without: all of the gradient.
template <class S, class O, class Rows, class OutRows, class Of>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 2 : 4)
    dlogits_kernel(Rows rows, OutRows out_rows, Of of, const typename Accumulate<S>::T* norm, int64_t norm_stride,
                   const typename Accumulate<S>::T* logp, const typename Accumulate<S>::T* g,
                   typename Accumulate<S>::T slope_at_0, typename Accumulate<S>::T* value) {
  using T = typename Accumulate<S>::T;
  const int64_t n = blockIdx.x;
  const Row<S> row = rows[n];
  const Row<O> to = out_rows[n];
  const int label = label_of(of, n, row.v);
  const T shift = norm[n], weight = g[n] * slope_at_0, factor = -weight / norm[norm_stride + n];
  const T own = -expm1(logp[n]) * weight;
  if (value != nullptr && label < 0 && blockIdx.y == 0 && threadIdx.x == 0) value[n] = 0;
  map_row(row, to, blockIdx.y, gridDim.y, [&](auto& x, int i) {
    constexpr int count = sizeof(x) / sizeof(T);
    T slope[count];
    of(x, i, slope);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      x[k] = exp_of(x[k] - shift) * factor * slope[k];
      if (i + k != label) continue;
      if (value != nullptr) value[n] = own * slope[k];
      x[k] = value != nullptr ? 0 : own * slope[k];
    }
  });
}

template <class S>
__global__ void __launch_bounds__(kThreads) zero_kernel(GatheredRows<S> rows) {
  const Row<S> row = rows[blockIdx.x];
  const int head = row.head(), packs = row.packs();
  for (int i = threadIdx.x; i < head; i += kThreads) row[i] = S{};
  for (int i = head + packs * kPer<S> + threadIdx.x; i < row.v; i += kThreads) row[i] = S{};
  auto* at = reinterpret_cast<Pack<S, kPer<S>>*>(row.data + head);
  for (int p = threadIdx.x; p < packs; p += kThreads) at[p] = Pack<S, kPer<S>>{};
}

// One thread a row; what is computed is derived in dpo_kernels/impl/fold.py.
template <class T>
__global__ void finish_kernel(FoldState state, const int64_t* y, int64_t n, int64_t v, Stats stats, T* logp, T* norm,
                              T* values) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const auto field = [&](Field f) { return state.data[f * state.stride + row]; };
  const double top = field(kMax), target = field(kTarget), sum = field(kSum), lead = target - top;
  const double own = lead > 0 ? -log1p(sum * exp(-lead)) : lead - log(sum + exp(lead));
  const double shift = larger(top, target), scale = exp(top - shift);
  const double total = sum * scale + exp(target - shift), log_prob_of_top = (top - shift) - log(total);
  logp[row] = static_cast<T>(own);
  norm[row] = static_cast<T>(shift);
  norm[n + row] = static_cast<T>(total);
  for (int k = 0; k < stats.count; ++k) {
    double value = 0;
    switch (stats.names[k]) {
      case kEntropy:
        value = (own == -INFINITY ? 0 : -exp(own) * own) - scale / total * (field(kSumEz) + sum * log_prob_of_top);
        break;
      case kIsTop1:
        value = target > top || (target == top && y[row] < state.argmax[row]);
        break;
      case kMeanLogit:
        value = field(kSumZ) / static_cast<double>(v);
        break;
      default: {
        const double a = log(field(kSumSq)) + 2 * log_prob_of_top, b = 2 * own, most = larger(a, b);
        value = most == -INFINITY ? most : most + log1p(exp(-fabs(a - b)));
      }
    }
    values[k * n + row] = static_cast<T>(value);
  }
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

template <class S, class O>
void fold_tile(const Tile& tile, const FoldState& state, const Matrix& out, const Matrix& sums, bool stats,
               cudaStream_t stream) {
  using T = typename Accumulate<S>::T;
  using Of = Entries<T>;
  const Of of{static_cast<const T*>(tile.bias), Logit<T>(tile.transform), tile.start, tile.y};
  const auto rows = tile_rows<S>(tile.a, tile.v, tile.v);
  if (sums.data == nullptr) {
    run(stats ? fold_kernel<S, S, TileRows<S>, Of, true, false> : fold_kernel<S, S, TileRows<S>, Of, false, false>,
        tile.n, 1, stream, rows, of, state, TileRows<S>{}, TileRows<T>{});
  } else {
    run(stats ? fold_kernel<S, O, TileRows<S>, Of, true, true> : fold_kernel<S, O, TileRows<S>, Of, false, true>,
        tile.n, 1, stream, rows, of, state, tile_rows<O>(out.data, out.stride, tile.v),
        tile_rows<T>(sums.data, sums.stride, sums.columns));
  }
}

template <class S, class O>
void dlogits_tile(const Tile& tile, const Matrix& out, const GradRows& grad, void* value, cudaStream_t stream) {
  using T = typename Accumulate<S>::T;
  using Of = Entries<T>;
  run(dlogits_kernel<S, O, TileRows<S>, TileRows<O>, Of>, tile.n, 1, stream, tile_rows<S>(tile.a, tile.v, tile.v),
      tile_rows<O>(out.data, out.stride, tile.v),
      Of{static_cast<const T*>(tile.bias), Logit<T>(tile.transform), tile.start, tile.y},
      static_cast<const T*>(grad.norm), grad.norm_stride, static_cast<const T*>(grad.logp),
      static_cast<const T*>(grad.g), static_cast<T>(tile.transform.slope()), static_cast<T*>(value));
}

template <class S>
GatheredRows<S> gathered(const LogitsRows& logits, const Rows& rows) {
  return {static_cast<S*>(logits.data),
          logits.stride_s,
          logits.stride_t,
          logits.stride_v,
          rows.sequence,
          rows.position,
          entries(rows.v)};
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

void logits_fold(DType type, const LogitsRows& logits, const Rows& rows, const FoldState& state, bool stats,
                 cudaStream_t stream) {
  for_type(type, [&](auto s) {
    using S = decltype(s);
    using Of = PlainEntries<typename Accumulate<S>::T>;
    run(stats ? fold_kernel<S, S, GatheredRows<S>, Of, true, false>
              : fold_kernel<S, S, GatheredRows<S>, Of, false, false>,
        rows.n, 1, stream, gathered<S>(logits, rows), Of{rows.y}, state, TileRows<S>{},
        TileRows<typename Accumulate<S>::T>{});
  });
}

void logits_bwd(DType type, const LogitsRows& logits, const LogitsRows& out, const Rows& rows, const GradRows& grad,
                cudaStream_t stream) {
  for_type(type, [&](auto s) {
    using S = decltype(s);
    using T = typename Accumulate<S>::T;
    using Of = PlainEntries<T>;
    run(dlogits_kernel<S, S, GatheredRows<S>, GatheredRows<S>, Of>, rows.n, blocks_of<S>(rows.v), stream,
        gathered<S>(logits, rows), gathered<S>(out, rows), Of{rows.y}, static_cast<const T*>(grad.norm),
        grad.norm_stride, static_cast<const T*>(grad.logp), static_cast<const T*>(grad.g), T(1), nullptr);
  });
}

void zero_rows(DType type, const LogitsRows& out, const Rows& rows, cudaStream_t stream) {
  for_type(type, [&](auto s) { run(zero_kernel<decltype(s)>, rows.n, 1, stream, gathered<decltype(s)>(out, rows)); });
}

void finish(DType type, const FoldState& state, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, cudaStream_t stream) {
  const auto with = [&](auto t) {
    using T = decltype(t);
    run(finish_kernel<T>, (n + kThreads - 1) / kThreads, 1, stream, state, y, n, v, stats, static_cast<T*>(logp),
        static_cast<T*>(norm), static_cast<T*>(values));
  };
  type == DType::f64 ? with(double()) : with(float());
}

}  // namespace dpo_kernels::cuda

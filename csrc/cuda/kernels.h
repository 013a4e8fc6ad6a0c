// The CUDA kernels as the bindings see them. Every call puts work on the stream of the current device and returns.
#pragma once

#include <cuda_runtime.h>

#include "../tiles.h"

namespace dpo_kernels::cuda {

// What the gradients of rows need beside their logits, all of the accumulation type. norm: shift [n] and, `norm_stride`
// further, sum [n].
struct GradRows {
  const void* norm;
  int64_t norm_stride;
  const void *logp, *g;
};

// A row-major matrix, `stride` entries from row to row.
struct Matrix {
  void* data;
  int64_t rows, columns, stride;
};

// Takes a tile of `type` into the state. With `sums` [n, H], of the tile's type, that has data: writes exp(z - max)
// times the softcap's slope to `out` of `out_type`, 0 at the label, and brings the sums to the new maximum.
void fold(DType type, const Tile&, const FoldState&, DType out_type, const Matrix& out, const Matrix& sums, bool stats,
          cudaStream_t);
// Writes -g p dz/da of a tile to `out`, 0 at the label, whose own entry goes to value [n]; 0 if it is not in the tile.
void dlogits(DType type, const Tile&, DType out_type, const Matrix& out, const GradRows&, void* value, cudaStream_t);
// Writes 0 to rows of `out`; their labels are not read.
void zero_rows(DType type, const LogitsRows& out, const Rows&, cudaStream_t);
// From logits that exist: folds whole rows into a new state, and writes the gradient of sum g logp over rows of `out`.
void logits_fold(DType type, const LogitsRows&, const Rows&, const FoldState&, bool stats, cudaStream_t);
void logits_bwd(DType type, const LogitsRows&, const LogitsRows& out, const Rows&, const GradRows&, cudaStream_t);

struct LinearFold {
  Matrix x, w;       // [N, H], [V, H]
  const void* bias;  // [V] of their type, or null
  const int64_t* y;  // [N]
  Transform transform;
  int splits;            // of the vocabulary
  float* part;           // [kPartFields or kPartStatsFields, splits, N]
  int64_t* part_argmax;  // [splits, N], with statistics
};
enum PartField {
  kPartMax,
  kPartTarget,
  kPartSum,
  kPartFields,
  kPartSumZ = kPartFields,
  kPartSumEz,
  kPartSumSq,
  kPartStatsFields
};
// Rows that a cluster of two blocks takes at once, and columns: what `splits` is chosen by.
constexpr int kClusterBlocks = 2, kClusterRows = 256, kBlockColumns = 256;
// Folds x.W^T on Hopper's tensor cores, without tiles: see linear_fold.cu. `processors`: multiprocessors of the device.
void linear_fold(DType type, const LinearFold&, const FoldState&, bool stats, int processors, cudaStream_t);

// What a finished state says of each row, of `type`: logp [N], norm [2, N], and the statistics [count, N] that `stats`
// names, in its order. See dpo_kernels/impl/fold.py, whose `finish` this is.
enum Stat { kEntropy, kIsTop1, kMeanLogit, kLogSumSqProbs };
struct Stats {
  int count;
  int names[4];
};
void finish(DType type, const FoldState&, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, cudaStream_t);

// Numbers of positions [S, T] that lie apart as strides say; no data: none.
struct Positions {
  const void* data;
  int64_t stride_s, stride_t;
};
struct Labels {
  const int64_t* data;
  int64_t stride_s, stride_t, sequences, length, ignore_index;

  DPO_HOST_DEVICE int64_t operator()(int64_t s, int64_t t) const { return data[s * stride_s + t * stride_t]; }
};
// Sums [S], or means over labelled positions, of log-probabilities times weights, of `type`; and how many are labelled.
void sum_tokens(DType type, const Positions& logps, const Labels&, const Positions& weights, bool mean, void* sums,
                int64_t* counts, cudaStream_t);
// From the gradient with respect to the sums, those with respect to log-probabilities and, unless null, weights, dense
// [S, T]. counts: of means alone.
void sum_tokens_bwd(DType type, const void* grad, int64_t grad_stride, const Positions& logps, const Labels&,
                    const Positions& weights, const int64_t* counts, void* dlogps, void* dweights, cudaStream_t);

// Throws a std::runtime_error that names what failed.
void check(cudaError_t status, const char* what);

}  // namespace dpo_kernels::cuda

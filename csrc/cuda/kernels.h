// The CUDA kernels as the bindings see them. Every call puts work on the stream of the current device and returns.
#pragma once

#include <cuda_runtime.h>

#include "../finish.h"
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
void finish(DType type, const FoldState&, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, cudaStream_t);

// Numbers of positions [S, T] that lie apart as strides say; no data: none.
struct Positions {
  const void* data;
  int64_t stride_s, stride_t;

  template <class T>
  DPO_HOST_DEVICE T at(int64_t s, int64_t t) const {
    return static_cast<const T*>(data)[s * stride_s + t * stride_t];
  }
};
struct Labels {  // of fewer than 2^31 positions
  const int64_t* data;
  int64_t stride_s, stride_t, sequences, length, ignore_index;

  DPO_HOST_DEVICE int64_t count() const { return sequences * length; }
  DPO_HOST_DEVICE int64_t at(int64_t s, int64_t t) const { return data[s * stride_s + t * stride_t]; }
};
// Path E, from logits [S, T, V]: logp [S, T], norm [2, S, T] and the statistics [count, S, T] that `stats` names, 0 at
// ignored positions; fit: 1 if all labels are among the v entries, and `num_labelled` of them, unless negative; or 0.
void logits_fwd(DType type, const LogitsRows&, const Labels&, int64_t v, int64_t num_labelled, const Stats& stats,
                void* logp, void* norm, void* values, int* fit, cudaStream_t);
// The gradient of sum g logp, in `out`, which may be the logits; 0 at ignored positions.
void logits_bwd(DType type, const LogitsRows&, const LogitsRows& out, const Labels&, int64_t v, const void* norm,
                const void* logp, const Positions& g, cudaStream_t);
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

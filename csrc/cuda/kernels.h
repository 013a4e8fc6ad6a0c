// The CUDA kernels as the bindings see them. Every call puts work on the stream of the current device and returns.
#pragma once

#include <cuda_runtime.h>

#include "../finish.h"
#include "../pairs.h"
#include "../positions.h"
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

// Multiplies dense rows by a factor of their accumulation type; where it is 1, they are not touched.
void scale(DType type, const Matrix& rows, const void* factor, cudaStream_t);

// Products x.W^T on Hopper's tensor cores without tiles of logits: see linear_fold.cu. `processors`: multiprocessors of
// the device.
struct LinearProduct {
  Matrix x, w;       // [N, H], [V, H]
  const void* bias;  // [V] of their type, or null
  const int64_t* y;  // [N]
  int64_t first;     // what y calls the first of the V entries
  Transform transform;
  int splits;  // of these entries
};
// Rows that a cluster of two blocks takes at once, and columns: what `splits` is chosen by.
constexpr int kClusterBlocks = 2, kClusterRows = 256, kBlockColumns = 256;

// What the splits of a vocabulary leave of each row, before the factor `outer`: field f of split s and row n, of the
// entries beside the label but for the sum of z, lies at data[f * field_stride + s * split_stride + n]. What is known
// of the label, its split alone writes: field f at label[f * label_stride + n].
enum PartField { kPartMax, kPartSum, kPartFields, kPartSumZ = kPartFields, kPartSumEz, kPartSumSq, kPartStatsFields };
enum LabelField {
  kLabelLogit,
  kLabelDerivative,  // the softcap's part of dz/da
  kLabelFields,
  kLabelSplit = kLabelFields,  // the bits of an int
  kLabelBefore,                // four numbers: the largest of these is that of the split's entries before the label
  kLabelStatsFields = kLabelBefore + 4
};
struct Parts {
  float* data;
  int64_t split_stride, field_stride;
  float* label;
  int64_t label_stride;
};
// Folds all of the vocabulary. `far` [N], if not null, is that of `Exponentials` to come, of rows that may lie in blocks
// of any sizes: it becomes 0.
void linear_fold(DType type, const LinearProduct&, const Parts&, bool stats, int* far, int processors, cudaStream_t);

// Exponentials exp(z - shift) dz/da, without the scale's part, as [V, N] in 16 bits; 0 at the label. The sums that go
// with them are of what was not rounded. In bf16 with the row's shift, which is given; or `packed`: times kPackedOne in
// fp16, with the largest that a split has seen so far of the row, which is written for each block of columns. Shifts
// have no factor `outer`.
struct Exponentials {
  Matrix e;  // no data: they are stored nowhere
  bool packed;
  float* shift;          // [N], or packed: [blocks of columns, N]
  int64_t shift_stride;  // from block to block
  // Not packed: an entry is far that is more than `far_above` (of z) above the shift. `far` [N] gets a 1 at the first
  // of kClusterRows rows if there is a far one among these. `again`: these rows are gone over once more, with the
  // largest entry of all splits in the place of the shift of a row that has a far one; nothing else is touched.
  int* far;
  double far_above;
  bool again;
  int splits;  // of all of the vocabulary
};
// Writes the exponentials of W's entries, and sums to the parts from `first_split` on.
void linear_exp(const LinearProduct&, const Parts&, int first_split, const Exponentials&, bool stats, int processors,
                cudaStream_t);
// Writes the gradient of sum_n g_n logp_n with respect to x.W^T to out [V, N or more] in bf16; 0 in columns behind N.
// missing [N]: of rows with a label among these entries, what rounding left of the label's. `grad` is of fp32.
void linear_dlogits(const LinearProduct&, const Matrix& out, const GradRows& grad, float* missing, int processors,
                    cudaStream_t);

// What a finished state says of each row, of `type`: logp [N], norm [2, N], and the statistics [count, N] that `stats`
// names, in its order. See dpo_kernels/impl/fold.py, whose `finish` this is.
void finish(DType type, const FoldState&, const int64_t* y, int64_t n, int64_t v, const Stats& stats, void* logp,
            void* norm, void* values, cudaStream_t);

// The same of what a sweep without tiles left: logp [N], norm [2, N] and values [count, N] in fp32. And for what was
// stored, unless `scale` is null: what exponentials are multiplied by to be d logp / da, for the largest entry `top`
// (without the factor `outer`) or the row's shift; and the label's entry, which is so multiplied too.
// With `places` [N], logp and values are of all `positions`, where row n lies at places[n]; norm may be null.
struct Joined {
  float *logp, *norm, *values;
  float *top, *scale, *label;  // [N]
  const int64_t* places;
  int64_t positions;
};
void join(const Transform&, const Parts&, int splits, int64_t n, int64_t v, const Stats& stats, const float* shift,
          double far_above, const Joined&, cudaStream_t);
// What packed exponentials of N rows are multiplied by to be the gradient d of sum_n g_n logp_n with respect to x.W^T:
// [kFactors + blocks of columns, N] in fp32. Row kLabels has the bits of labels, as ints, row kOwn labels' own entries.
enum WeightRow { kLabels, kOwn, kFactors };
struct RowWeights {
  const int64_t* y;
  const float *top, *scale, *label, *g;  // of `Joined`, and the gradient with respect to logp
  float* own;                            // [N]: a copy of row kOwn
};
// Makes weights of shifts, which are where factors will be.
void weigh(const Transform&, const Matrix& weights, const RowWeights&, cudaStream_t);

// Exponentials of entries of the vocabulary from `first` on, whose first block of columns has factors `first_block`.
struct Weighed {
  Matrix e, weights;
  int64_t first;
  int first_block;
};
// out [N, H] in fp32: d^T W without labels' entries, of the entries of `of` and then of `rest`, which may have none; as
// `parts` of the sum, each as large as the others, of which those behind the first lie behind it, dense. See
// linear_gradients.cu.
void linear_dhidden(const Weighed& of, const Weighed& rest, const Matrix& w, const Matrix& out, int parts,
                    int processors, cudaStream_t);
// out [v, H]: d x, of the entries of `of`. In bf16, rounded once; or in fp32, added to what is there if `add`; without
// data, nowhere. bias [v], or null: sums of d over rows.
void linear_dweight(const Weighed& of, const Matrix& x, DType out_type, const Matrix& out, bool add, float* bias,
                    int processors, cudaStream_t);
// scale (sums + label W_y), or without a scale if that is null: sums [N, H] in fp32, W in bf16, out in fp32 or bf16.
void dhidden(DType out_type, const Matrix& sums, const Matrix& w, const int64_t* y, const float* scale,
             const float* label, void* out, cudaStream_t);

struct Labels {  // of fewer than 2^31 positions
  const int64_t* data;
  int64_t stride_s, stride_t, sequences, length, ignore_index;

  DPO_HOST_DEVICE int64_t count() const { return sequences * length; }
  DPO_HOST_DEVICE int64_t at(int64_t s, int64_t t) const { return data[s * stride_s + t * stride_t]; }
};
// Looks for labelled rows.
void find_rows(LabelType type, const Search&, const FoundRows&, cudaStream_t);
// Of hidden states [R, `of_sequence`, H], those in `slots` of the flat [R U], which has fewer than 2^31 of them, to
// out [N, H]; `broken` becomes 1 if one of their numbers is not finite.
void gather_rows(DType type, const LogitsRows& hidden, int64_t of_sequence, const int64_t* slots, const Matrix& out,
                 int64_t* broken, cudaStream_t);
// Each of rows [N, H] in fp32, times the number of g [S, T] in fp32 at its position, to that position of `out`
// [S, `length`, H].
void put_rows(DType out_type, const Matrix& rows, const Positions& g, const int64_t* sequence, const int64_t* position,
              int64_t length, void* out, cudaStream_t);
// Sums the sequences of these rows, and compares their pairs; begins, ends [S]: memory that it uses.
void compare(DType type, const Comparison&, const PairRows&, int64_t* begins, int64_t* ends, cudaStream_t);
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

// The CPU kernels as the bindings see them: one table of functions for each instruction set.
//
// Dimensions: N rows, V vocabulary size; a tile is n rows by v vocabulary entries, contiguous, fp32 or fp64.
#pragma once

#include <cstdint>

#include "../finish.h"
#include "../pairs.h"
#include "../positions.h"
#include "../tiles.h"

namespace dpo_kernels {

// Labelled rows of logits: row r lies at sequence[r] * stride_s + position[r] * stride_t.
struct Rows {
  const int64_t *sequence, *position, *y;
  int64_t n, v;
};

struct Kernels {
  const char* name;
  // Takes a tile into the state. With `rescale` [n], of the tile's type: leaves exp(z - max) times the softcap's slope
  // in the tile, 0 at the label, and writes the factor that brings what was accumulated before to the new maximum.
  void (*fold)(DType, const Tile&, const FoldState&, void* rescale, bool stats, int threads);
  // Writes -g p dz/da of a tile to `out`, which may be the tile, 0 at the label, whose own entry goes to value [n], or 0
  // where it is not in the tile. norm: shift [n] and, `norm_stride` further, sum [n]. All of the tile's type.
  void (*dlogits)(DType, const Tile&, void* out, const void* norm, int64_t norm_stride, const void* logp, const void* g,
                  void* value, int threads);
  // From logits that exist: folds whole rows, and writes the gradient of sum g logp over rows of `out`.
  void (*logits_fold)(DType, const LogitsRows&, const Rows&, const FoldState&, bool stats, int threads);
  void (*logits_bwd)(DType, const LogitsRows&, const LogitsRows& out, const Rows&, const void* norm,
                     int64_t norm_stride, const void* logp, const void* g, int threads);
  // What a finished state says of each row, of a type: logp [N], norm [2, N] and the statistics [count, N].
  void (*finish)(DType, const FoldState&, const int64_t* y, int64_t n, int64_t v, const Stats&, void* logp, void* norm,
                 void* values, int threads);
  // out [v, n] = a [n, v] transposed.
  void (*transpose)(const float* a, float* out, int64_t n, int64_t v, int threads);
  // Elementwise, in place, for tests of their accuracy.
  void (*exp)(float*, int64_t n);
  void (*tanh)(float*, float* slope, int64_t n);
};

// Null where this binary has no such kernels.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// Looks for labelled rows.
void find_rows(LabelType, const Search&, const FoundRows&);
// Of hidden states [R, `of_sequence`, H], those in `slots` [n] of the flat [R U], to out [n, H]; `broken` becomes 1 if one
// of their numbers is not finite.
void gather_rows(DType, const LogitsRows& hidden, int64_t of_sequence, int64_t h, const int64_t* slots, int64_t n,
                 void* out, int64_t* broken, int threads);

// Sums the sequences of these rows, and compares their pairs.
void compare(DType, const Comparison&, const PairRows&);

// Functions of the OpenMP runtime that this process has loaded; all null until `set_openmp`.
struct OpenMP {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
  int (*get_thread_num)() = nullptr;
  int (*get_num_threads)() = nullptr;
};
void set_openmp(const OpenMP& functions);

// Runs fn on a team of up to `threads`, or in this thread alone where there is no OpenMP runtime. `size` is what the
// team has really become.
void run_team(void (*fn)(void* data, int rank, int size), void* data, int threads);

}  // namespace dpo_kernels

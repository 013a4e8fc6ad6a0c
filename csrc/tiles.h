// What the kernels of every device are given: addresses, sizes and strides (in elements). Nothing here owns memory.
//
// Dimensions: N rows, V vocabulary size; a tile is n rows by v vocabulary entries, contiguous, fp32 or fp64.
#pragma once

#include "arithmetic.h"

namespace dpo_kernels {

// What a sweep remembers of each of N rows: field k of row n at data[k * stride + n], see dpo_kernels/impl/fold.py.
enum Field { kMax, kTarget, kLabelSlope, kSum, kSumZ, kSumEz, kSumSq, kFields };
struct FoldState {
  double* data;
  int64_t stride;
  int64_t* argmax;  // [N]
};

// A tile of products a = x.W, with the vocabulary entries from `start` on and labels y [n] counted from 0.
struct Tile {
  void* a;
  int64_t n, v, start;
  const int64_t* y;
  const void* bias;  // [v] of the tile's type, or null
  Transform transform;
};

// Logits [S, T, V]. Strides in elements.
struct LogitsRows {
  void* data;
  int64_t stride_s, stride_t, stride_v;
};

}  // namespace dpo_kernels

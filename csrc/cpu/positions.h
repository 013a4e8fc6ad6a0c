// Labelled rows, found and copied; see dpo_kernels/impl/positions.py.
//
// Dimensions: S sequences of T positions, N labelled rows, K statistics; R sequences of U hidden states of H numbers.
#pragma once

#include <cstdint>
#include <string>

#include "../tiles.h"

namespace dpo_kernels {

// [S, T] of integers, or null. Strides in elements.
struct Positions {
  const void* data;
  int64_t stride_s, stride_t;

  template <class I>
  int64_t at(int64_t s, int64_t t) const {
    return static_cast<int64_t>(static_cast<const I*>(data)[s * stride_s + t * stride_t]);
  }
};

struct Search {
  Positions labels;
  int64_t sequences, length, shift, ignore_index, v, expected;  // labelled rows, or -1
  Positions predictors;                                         // int64
  int64_t slots;
};

// rows [5, capacity]: sequence, position, place, label, slot. logp [S, T] and values [K, S, T] become 0 where there is no
// label. notes [3]: how many rows there are, whether all is as it should be, and 0.
struct FoundRows {
  int64_t *rows, capacity;
  float *logp, *values;
  int64_t stats, *notes;
};

// `label_type`: by PyTorch's name.
void find_rows(const std::string& label_type, const Search&, const FoundRows&);

// out [n, h] = hidden [R, U, H] at the flat slots [n]; `broken` becomes 1 where one is not finite.
void gather_rows(DType, const LogitsRows& hidden, int64_t of_sequence, int64_t h, const int64_t* slots, int64_t n,
                 void* out, int64_t* broken, int threads);

}  // namespace dpo_kernels

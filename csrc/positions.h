// Labelled rows among positions, as the kernels of every device look for them; see dpo_kernels/impl/positions.py.
//
// Dimensions: S sequences of T positions, N labelled rows, K statistics.
#pragma once

#include "arithmetic.h"

namespace dpo_kernels {

// Numbers of positions [S, T] that lie apart as strides say; no data: none.
struct Positions {
  const void* data;
  int64_t stride_s, stride_t;

  template <class T>
  DPO_HOST_DEVICE T at(int64_t s, int64_t t) const {
    return static_cast<const T*>(data)[s * stride_s + t * stride_t];
  }
};

// What is looked for among labels [S, T] of integers: those that are not ignored, which are to be among the v entries,
// and `expected` of them unless that is negative. With shift 1, what is predicted at t is the label at t + 1. The hidden
// state that does lies where `predictors` say, if they have data, among `slots` places; else at the position itself.
// Fewer than 2^30 positions.
enum class LabelType { i64, i32, i16, i8, u8 };
struct Search {
  Positions labels;
  int64_t sequences, length;
  int shift;
  int64_t ignore_index, v, expected;
  Positions predictors;
  int64_t slots;
  bool asserts;  // that all is as it should be: else the notes alone say so
};
// Field f of labelled row n goes to rows[f * capacity + n], of no more than `capacity` of them; 0 to logp [S, T] and to
// `stats` tables [S, T] of values at all other positions; and the notes. See dpo_kernels/impl/positions.py.
enum RowField { kRowSequence, kRowPosition, kRowPlace, kRowLabel, kRowSlot, kRowFields };
enum Note { kNoteCount, kNoteFits, kNoteBroken, kNotes };
struct FoundRows {
  int64_t* rows;
  int64_t capacity;
  float *logp, *values;
  int stats;
  int64_t* notes;
};

}  // namespace dpo_kernels

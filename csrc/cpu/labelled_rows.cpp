// Labelled rows found and copied, by one thread and by all.
//
// Dimensions: S sequences of T positions, N labelled rows, K statistics; R sequences of U hidden states of H numbers.
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "kernels.h"

namespace dpo_kernels {
namespace {

template <class L>
void find(const Search& of, const FoundRows& out) {
  const int64_t positions = of.sequences * of.length;
  int64_t n = 0, place = 0;
  bool fits = true;
  for (int64_t s = 0; s < of.sequences; ++s) {
    for (int64_t t = 0; t < of.length; ++t, ++place) {
      const bool predicts = t + of.shift < of.length;
      const int64_t label = predicts ? static_cast<int64_t>(of.labels.at<L>(s, t + of.shift)) : of.ignore_index;
      if (label == of.ignore_index) {
        out.logp[place] = 0;
        for (int k = 0; k < out.stats; ++k) out.values[k * positions + place] = 0;
        continue;
      }
      const int64_t slot = of.predictors.data ? of.predictors.at<int64_t>(s, t) : place;
      fits &= 0 <= label && label < of.v && 0 <= slot && slot < of.slots;
      if (n < out.capacity) {
        int64_t* row = out.rows + n;
        row[kRowSequence * out.capacity] = s;
        row[kRowPosition * out.capacity] = t;
        row[kRowPlace * out.capacity] = place;
        row[kRowLabel * out.capacity] = label;
        row[kRowSlot * out.capacity] = slot;
      }
      ++n;
    }
  }
  out.notes[kNoteCount] = n;
  out.notes[kNoteFits] = fits && (of.expected < 0 || n == of.expected);
  out.notes[kNoteBroken] = 0;
}

// Infinity and NaN have every bit of the exponent. `Bits`: an integer of the size of S.
template <class Bits>
bool copy_row(const Bits* from, int64_t stride, Bits* to, int64_t h, Bits exponent) {
  if (stride == 1) {
    std::memcpy(to, from, h * sizeof(Bits));
  } else {
    for (int64_t i = 0; i < h; ++i) to[i] = from[i * stride];
  }
  Bits broken = 0;
  for (int64_t i = 0; i < h; ++i) broken |= (to[i] & exponent) == exponent;
  return broken != 0;
}

template <class Bits>
void gather(const LogitsRows& hidden, int64_t of_sequence, int64_t h, const int64_t* slots, int64_t n, void* out,
            int64_t* broken, int threads, Bits exponent) {
  struct Work {
    const LogitsRows& hidden;
    int64_t of_sequence, h;
    const int64_t* slots;
    int64_t n;
    Bits *out, exponent;
    std::atomic<bool> broken;
  } work{hidden, of_sequence, h, slots, n, static_cast<Bits*>(out), exponent, {false}};
  run_team(
      [](void* data, int rank, int size) {
        Work& w = *static_cast<Work*>(data);
        for (int64_t row = w.n * rank / size; row < w.n * (rank + 1) / size; ++row) {
          const int64_t r = w.slots[row] / w.of_sequence, u = w.slots[row] % w.of_sequence;
          const Bits* from = static_cast<const Bits*>(w.hidden.data) + r * w.hidden.stride_s + u * w.hidden.stride_t;
          if (copy_row(from, w.hidden.stride_v, w.out + row * w.h, w.h, w.exponent)) w.broken = true;
        }
      },
      &work, n < threads ? static_cast<int>(n) : threads);
  if (work.broken) *broken = 1;
}

}  // namespace

void find_rows(LabelType type, const Search& of, const FoundRows& out) {
  switch (type) {
    case LabelType::i64:
      return find<int64_t>(of, out);
    case LabelType::i32:
      return find<int32_t>(of, out);
    case LabelType::i16:
      return find<int16_t>(of, out);
    case LabelType::i8:
      return find<int8_t>(of, out);
    case LabelType::u8:
      return find<uint8_t>(of, out);
  }
}

void gather_rows(DType type, const LogitsRows& hidden, int64_t of_sequence, int64_t h, const int64_t* slots, int64_t n,
                 void* out, int64_t* broken, int threads) {
  const auto with = [&](auto exponent) { gather(hidden, of_sequence, h, slots, n, out, broken, threads, exponent); };
  switch (type) {
    case DType::f32:
      return with(uint32_t{0x7f800000});
    case DType::f64:
      return with(uint64_t{0x7ff0000000000000});
    case DType::bf16:
      return with(uint16_t{0x7f80});
    case DType::f16:
      return with(uint16_t{0x7c00});
  }
}

}  // namespace dpo_kernels

// Which of the positions carry a label, their hidden states together, and what comes of these back at its positions.
//
// Dimensions: S sequences of T positions, P = S T of them in all, N labelled ones, K statistics; R sequences of U hidden
// states of H numbers, which are S and T but for predictors.
#undef NDEBUG  // a wrong number of rows is no matter of debugging
#include <cassert>
#include <stdexcept>

#include "row.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kFindThreads = 1024, kFindWarps = kFindThreads / 32;
static_assert(kFindWarps == 32);  // a warp has a thread for each
// Labels that a thread has on their way at once.
constexpr int kAtOnce = 8;
// Each block counts the rows before its own by itself, so that there must not be too many.
constexpr int kMostBlocks = 64;

// The positions of a thread, kFindThreads apart, and where their labels lie, without a division for each.
struct Walk {
  int s, t, by_s, by_t, length;
  int64_t offset, by_offset, at_end;

  __device__ Walk(const Search& of, int first)
      : s(first / static_cast<int>(of.length)),
        t(first % static_cast<int>(of.length)),
        by_s(kFindThreads / static_cast<int>(of.length)),
        by_t(kFindThreads % static_cast<int>(of.length)),
        length(static_cast<int>(of.length)),
        offset(s * of.labels.stride_s + (t + of.shift) * of.labels.stride_t),
        by_offset(by_s * of.labels.stride_s + by_t * of.labels.stride_t),
        at_end(of.labels.stride_s - length * of.labels.stride_t) {}
  __device__ __forceinline__ void next() {
    s += by_s;
    t += by_t;
    offset += by_offset;
    if (t < length) return;
    ++s;
    t -= length;
    offset += at_end;
  }
  __device__ int64_t place() const { return static_cast<int64_t>(s) * length + t; }
};

// `ignore_index` where nothing is predicted.
template <class L>
__device__ __forceinline__ int64_t label_at(const Search& of, const Walk& at, bool is_position) {
  if (!is_position || at.t + of.shift >= at.length) return of.ignore_index;
  return static_cast<int64_t>(static_cast<const L*>(of.labels.data)[at.offset]);
}

__device__ __forceinline__ bool lies_outside(int64_t i, int64_t size) {
  return static_cast<uint64_t>(i) >= static_cast<uint64_t>(size);
}

__device__ __forceinline__ int over_warp(int x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// A block has `rounds` times kFindThreads positions. Rows are written in the order of positions.
template <class L>
__global__ void __launch_bounds__(kFindThreads) find_rows_kernel(Search of, FoundRows out, int rounds) {
  __shared__ int shared[kFindWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int begin = static_cast<int>(blockIdx.x) * rounds * kFindThreads;
  const int64_t positions = of.sequences * of.length;
  const bool is_last = blockIdx.x + 1 == gridDim.x;  // and checks what all others have

  int before = 0;
  bool wrong = false;
  Walk at(of, thread);
  for (int first = 0; first < begin; first += kAtOnce * kFindThreads) {
    int64_t labels[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j, at.next()) labels[j] = label_at<L>(of, at, first + j * kFindThreads < begin);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      before += labels[j] != of.ignore_index;
      wrong |= labels[j] != of.ignore_index && lies_outside(labels[j], of.v);
    }
  }
  if (is_last && of.predictors.data != nullptr) {
    at = Walk(of, thread);
    for (int first = 0; first < begin; first += kFindThreads, at.next()) {
      const bool is_row = label_at<L>(of, at, true) != of.ignore_index;
      wrong |= is_row && lies_outside(of.predictors.at<int64_t>(at.s, at.t), of.slots);
    }
  }
  before = over_block(before, shared, [](int a, int b) { return a + b; });

  at = Walk(of, begin + thread);
  for (int round = 0; round < rounds; ++round, at.next()) {
    const int64_t place = at.place(), label = label_at<L>(of, at, place < positions);
    const bool is_row = label != of.ignore_index;
    const unsigned rows = __ballot_sync(kAllLanes, is_row);
    __syncthreads();  // what was there has been read
    if (lane == 0) shared[warp] = __popc(rows);
    __syncthreads();
    const int of_warp = shared[lane];
    const int64_t n = before + over_warp(lane < warp ? of_warp : 0) + __popc(rows & ((1u << lane) - 1));
    before += over_warp(of_warp);
    if (is_row) {
      const int64_t slot = of.predictors.data == nullptr ? place : of.predictors.at<int64_t>(at.s, at.t);
      wrong |= lies_outside(label, of.v) || lies_outside(slot, of.slots);
      if (n >= out.capacity) continue;
      int64_t* row = out.rows + n;
      row[kRowSequence * out.capacity] = at.s;
      row[kRowPosition * out.capacity] = at.t;
      row[kRowPlace * out.capacity] = place;
      row[kRowLabel * out.capacity] = label;
      row[kRowSlot * out.capacity] = slot;
    } else if (place < positions) {
      out.logp[place] = 0;
      for (int k = 0; k < out.stats; ++k) out.values[k * positions + place] = 0;
    }
  }
  if (!is_last) return;
  const int any_wrong = over_block<int>(wrong, shared, [](int a, int b) { return a | b; });
  if (thread != 0) return;
  const bool fits = any_wrong == 0 && (of.expected < 0 || before == of.expected);
  assert((fits || !of.asserts) &&
         "num_labelled does not fit the labels, or a label lies outside the vocabulary, or a predictor outside the "
         "hidden states");
  out.notes[kNoteCount] = before;
  out.notes[kNoteFits] = fits;
  out.notes[kNoteBroken] = 0;
}

// A block has a row. All that find a number that is not finite write the same.
template <class S>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(LogitsRows hidden, int of_sequence, const int64_t* slots, TileRows<S> out, int64_t* broken) {
  const int64_t n = blockIdx.x;
  const int slot = static_cast<int>(slots[n]), r = slot / of_sequence, u = slot % of_sequence;
  S* const from = static_cast<S*>(hidden.data) + r * hidden.stride_s + u * hidden.stride_t;
  bool is_finite = true;
  map_row(Row<S>{from, hidden.stride_v, out.v}, out[n], 0, 1, [&](auto& x, int) {
    constexpr int count = sizeof(x) / sizeof(x[0]);
#pragma unroll
    for (int k = 0; k < count; ++k) is_finite &= x[k] - x[k] == 0;
  });
  if (!is_finite) *broken = 1;
}

// A block has a row.
template <class O>
__global__ void __launch_bounds__(kThreads)
    put_rows_kernel(TileRows<float> rows, Positions g, const int64_t* sequence, const int64_t* position, int64_t length,
                    TileRows<O> out) {
  const int64_t n = blockIdx.x, s = sequence[n], t = position[n];
  const float factor = g.at<float>(s, t);
  map_row(rows[n], out[s * length + t], 0, 1, [&](auto& x, int) {
    constexpr int count = sizeof(x) / sizeof(x[0]);
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] *= factor;
  });
}

}  // namespace

void find_rows(LabelType type, const Search& of, const FoundRows& out, cudaStream_t stream) {
  const int64_t positions = of.sequences * of.length;
  if (positions == 0) return;
  const int64_t rounds = (positions + kMostBlocks * kFindThreads - 1) / (kMostBlocks * kFindThreads);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((positions + rounds * kFindThreads - 1) / (rounds * kFindThreads)));
  config.blockDim = dim3(kFindThreads);
  config.stream = stream;
  const auto launch = [&](auto kernel) {
    check(cudaLaunchKernelEx(&config, kernel, of, out, static_cast<int>(rounds)), "launch of the search for rows");
  };
  switch (type) {
    case LabelType::i64:
      return launch(find_rows_kernel<int64_t>);
    case LabelType::i32:
      return launch(find_rows_kernel<int32_t>);
    case LabelType::i16:
      return launch(find_rows_kernel<int16_t>);
    case LabelType::i8:
      return launch(find_rows_kernel<int8_t>);
    case LabelType::u8:
      return launch(find_rows_kernel<uint8_t>);
  }
}

void gather_rows(DType type, const LogitsRows& hidden, int64_t of_sequence, const int64_t* slots, const Matrix& out,
                 int64_t* broken, cudaStream_t stream) {
  const auto with = [&](auto s) {
    using S = decltype(s);
    run(gather_rows_kernel<S>, out.rows, 1, stream, hidden, static_cast<int>(of_sequence), slots,
        TileRows<S>{static_cast<S*>(out.data), out.stride, static_cast<int>(out.columns)}, broken);
  };
  switch (type) {
    case DType::f32:
      return with(float());
    case DType::f64:
      return with(double());
    case DType::bf16:
      return with(__nv_bfloat16());
    case DType::f16:
      return with(__half());
  }
}

void put_rows(DType out_type, const Matrix& rows, const Positions& g, const int64_t* sequence, const int64_t* position,
              int64_t length, void* out, cudaStream_t stream) {
  const int h = static_cast<int>(rows.columns);
  const auto with = [&](auto o) {
    using O = decltype(o);
    run(put_rows_kernel<O>, rows.rows, 1, stream, TileRows<float>{static_cast<float*>(rows.data), rows.stride, h}, g,
        sequence, position, length, TileRows<O>{static_cast<O*>(out), h, h});
  };
  switch (out_type) {
    case DType::f32:
      return with(float());
    case DType::f64:
      return with(double());
    case DType::bf16:
      return with(__nv_bfloat16());
    case DType::f16:
      return with(__half());
  }
}

}  // namespace dpo_kernels::cuda

// Pairs of sequences compared.
//
// Dimensions: S sequences of T positions, P pairs, N labelled rows. Arithmetic type T of log-probabilities.
//
// What a row weighs is known once all of its pair is, so a single block does everything, in one launch: about 50 bytes a
// row, beside the H V products that there are of each.
#include "kernels.h"
#include "math.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kCompareThreads = 1024, kCompareWarps = kCompareThreads / 32;
// Rows that a thread has on their way at once.
constexpr int kRowsAtOnce = 4;

// store(n, load(n)) for all n rows, with several loads before the first store.
template <class Load, class Store>
__device__ __forceinline__ void for_rows(int64_t rows, Load load, Store store) {
  for (int64_t first = threadIdx.x; first < rows; first += kRowsAtOnce * kCompareThreads) {
    decltype(load(first)) loaded[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (first + j * kCompareThreads < rows) loaded[j] = load(first + j * kCompareThreads);
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (first + j * kCompareThreads < rows) store(first + j * kCompareThreads, loaded[j]);
    }
  }
}

// begins, ends [S]: to be used. A sequence without rows begins and ends at 0.
template <class T>
__global__ void __launch_bounds__(kCompareThreads)
    compare_kernel(Comparison of, PairRows rows, int64_t* begins, int64_t* ends) {
  __shared__ double shared[kCompareWarps];
  struct Row {
    int64_t s, t, before, after;  // its sequence and position, and the neighbours' sequences
    T logp;
  };
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t *const sequence = rows.sequence, *const position = rows.position;
  const T* const logps = static_cast<const T*>(rows.logps);
  for (int64_t i = thread; i < of.sequences(); i += kCompareThreads) begins[of.sequence(i)] = ends[of.sequence(i)] = 0;
  __syncthreads();
  for_rows(
      rows.n,
      [&](int64_t n) {
        const int64_t before = n > 0 ? sequence[n - 1] : -1, after = n + 1 < rows.n ? sequence[n + 1] : -1;
        return Row{sequence[n], position[n], before, after, logps[n]};
      },
      [&](int64_t n, const Row& row) {
        static_cast<T*>(of.token_logps)[row.s * of.length + row.t] = row.logp;
        if (row.before != row.s) begins[row.s] = n;
        if (row.after != row.s) ends[row.s] = n + 1;
      });
  __syncthreads();
  // a warp has a sequence, from left to right, and adds what its threads have in one order
  for (int64_t i = warp; i < of.sequences(); i += kCompareWarps) {
    const int64_t s = of.sequence(i), begin = begins[s], end = ends[s];
    double sum = 0;
#pragma unroll 4
    for (int64_t n = begin + lane; n < end; n += 32) {
      const T weighted = logps[n] * of.weight<T>(s, position[n]);
      sum += weighted;
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane != 0) continue;
    static_cast<T*>(of.sums)[s] = static_cast<T>(sum);
    if (of.pairs > 0) of.counts[s] = end - begin;
  }
  if (of.pairs == 0) return;
  __syncthreads();
  for (int64_t b = of.first + thread; b < of.stop; b += kCompareThreads) of.compare<T>(b);
  __syncthreads();
  for_rows(
      rows.n,
      [&](int64_t n) {
        const int64_t s = sequence[n];
        return static_cast<const T*>(of.slopes)[s] * of.weight<T>(s, position[n]);
      },
      [&](int64_t n, T slope) { static_cast<T*>(rows.slopes)[n] = slope; });
  if (of.stop < of.pairs) return;
  double sum = 0;
  for (int64_t b = thread; b < of.pairs; b += kCompareThreads) sum += static_cast<const T*>(of.losses)[b];
  sum = over_block(sum, shared, [](double a, double b) { return a + b; });
  if (thread == 0) *static_cast<T*>(of.loss) = static_cast<T>(sum / static_cast<double>(of.pairs));
}

}  // namespace

void compare(DType type, const Comparison& of, const PairRows& rows, int64_t* begins, int64_t* ends,
             cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kCompareThreads);
  config.stream = stream;
  const auto launch = [&](auto kernel) {
    check(cudaLaunchKernelEx(&config, kernel, of, rows, begins, ends), "launch of the comparison of pairs");
  };
  type == DType::f64 ? launch(compare_kernel<double>) : launch(compare_kernel<float>);
}

}  // namespace dpo_kernels::cuda

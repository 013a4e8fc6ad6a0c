// Pairs of sequences compared.
//
// Dimensions: S sequences of T positions, P pairs, N labelled rows. Arithmetic type T of log-probabilities.
//
// What a row weighs is known once all of its pair is, so a single block does everything, in one launch: 12 bytes a row
// or position, beside the H V products that there are of each.
#include "kernels.h"
#include "math.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kCompareThreads = 1024, kCompareWarps = kCompareThreads / 32;

template <class T>
__global__ void __launch_bounds__(kCompareThreads) compare_kernel(Comparison of, PairRows rows) {
  __shared__ double shared[kCompareWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  T* const table = static_cast<T*>(of.token_logps);
#pragma unroll 4
  for (int64_t n = thread; n < rows.n; n += kCompareThreads) {
    table[rows.sequence[n] * of.length + rows.position[n]] = static_cast<const T*>(rows.logps)[n];
  }
  __syncthreads();
  // a warp has a sequence, from left to right, and adds what its threads have in one order
  for (int64_t i = warp; i < of.sequences(); i += kCompareWarps) {
    const int64_t s = of.sequence(i);
    double sum = 0;
    int count = 0;
#pragma unroll 4
    for (int64_t t = lane; t < of.length; t += 32) {
      sum += of.weighted<T>(s, t);
      count += of.is_labelled(s, t);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
      count += __shfl_xor_sync(kAllLanes, count, distance);
    }
    if (lane != 0) continue;
    static_cast<T*>(of.sums)[s] = static_cast<T>(sum);
    if (of.pairs > 0) of.counts[s] = count;
  }
  if (of.pairs == 0) return;
  __syncthreads();
  for (int64_t b = of.first + thread; b < of.stop; b += kCompareThreads) of.compare<T>(b);
  __syncthreads();
#pragma unroll 4
  for (int64_t n = thread; n < rows.n; n += kCompareThreads) {
    const int64_t s = rows.sequence[n];
    static_cast<T*>(rows.slopes)[n] = static_cast<const T*>(of.slopes)[s] * of.weight<T>(s, rows.position[n]);
  }
  if (of.stop < of.pairs) return;
  double sum = 0;
  for (int64_t b = thread; b < of.pairs; b += kCompareThreads) sum += static_cast<const T*>(of.losses)[b];
  sum = over_block(sum, shared, [](double a, double b) { return a + b; });
  if (thread == 0) *static_cast<T*>(of.loss) = static_cast<T>(sum / static_cast<double>(of.pairs));
}

}  // namespace

void compare(DType type, const Comparison& of, const PairRows& rows, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kCompareThreads);
  config.stream = stream;
  const auto launch = [&](auto kernel) {
    check(cudaLaunchKernelEx(&config, kernel, of, rows), "launch of the comparison of pairs");
  };
  type == DType::f64 ? launch(compare_kernel<double>) : launch(compare_kernel<float>);
}

}  // namespace dpo_kernels::cuda

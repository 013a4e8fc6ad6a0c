// Sums over the tokens of sequences, and what they are differentiated to.
//
// Dimensions: S sequences of T positions. Arithmetic type T of log-probabilities, fp32 or fp64; sums are fp64.
//
// A block has a sequence: each thread goes through it from left to right, and what they have is added in one order.
#include "kernels.h"
#include "math.cuh"
#include "row.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// 0 at ignored positions, whatever they hold; 1 without weights.
template <class T>
__device__ __forceinline__ T weight_of(const Positions& weights, bool is_labelled, int64_t s, int64_t t) {
  if (weights.data == nullptr) return 1;
  return is_labelled ? weights.at<T>(s, t) : 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_tokens_kernel(Positions logps, Labels labels, Positions weights, bool mean, T* sums, int64_t* counts) {
  __shared__ double shared_sum[kWarps];
  __shared__ int shared_count[kWarps];
  const int64_t s = blockIdx.x;
  double sum = 0;
  int count = 0;
  for (int64_t t = threadIdx.x; t < labels.length; t += kThreads) {
    const bool is_labelled = labels.at(s, t) != labels.ignore_index;
    // rounded as a tensor of these products is
    const T weighted = logps.at<T>(s, t) * weight_of<T>(weights, is_labelled, s, t);
    sum += weighted;
    count += is_labelled;
  }
  sum = over_block(sum, shared_sum, [](double a, double b) { return a + b; });
  count = over_block(count, shared_count, [](int a, int b) { return a + b; });
  if (threadIdx.x != 0) return;
  if (mean) sum /= max(count, 1);
  sums[s] = static_cast<T>(sum);
  counts[s] = count;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_tokens_bwd_kernel(const T* grad, int64_t grad_stride, Positions logps, Labels labels, Positions weights,
                          const int64_t* counts, T* dlogps, T* dweights) {
  const int64_t s = blockIdx.x, t = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (t >= labels.length) return;
  T g = grad[s * grad_stride];
  if (counts != nullptr) g /= static_cast<T>(counts[s] > 1 ? counts[s] : 1);
  const bool is_labelled = labels.at(s, t) != labels.ignore_index;
  const int64_t place = s * labels.length + t;
  dlogps[place] = g * weight_of<T>(weights, is_labelled, s, t);
  if (dweights != nullptr) dweights[place] = is_labelled ? g * logps.at<T>(s, t) : 0;
}

template <class Launch>
void for_type(DType type, Launch launch) {
  type == DType::f64 ? launch(double()) : launch(float());
}

}  // namespace

void sum_tokens(DType type, const Positions& logps, const Labels& labels, const Positions& weights, bool mean,
                void* sums, int64_t* counts, cudaStream_t stream) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    run(sum_tokens_kernel<T>, labels.sequences, 1, stream, logps, labels, weights, mean, static_cast<T*>(sums), counts);
  });
}

void sum_tokens_bwd(DType type, const void* grad, int64_t grad_stride, const Positions& logps, const Labels& labels,
                    const Positions& weights, const int64_t* counts, void* dlogps, void* dweights,
                    cudaStream_t stream) {
  for_type(type, [&](auto t) {
    using T = decltype(t);
    run(sum_tokens_bwd_kernel<T>, labels.sequences, (labels.length + kThreads - 1) / kThreads, stream,
        static_cast<const T*>(grad), grad_stride, logps, labels, weights, counts, static_cast<T*>(dlogps),
        static_cast<T*>(dweights));
  });
}

}  // namespace dpo_kernels::cuda

// A row of a tile, of sums, or of logits, and how the threads of a block go through it.
//
// Dimensions: v entries of a row. Storage type S of what is read, O of what is written, arithmetic type T.
//
// A thread takes kUnroll times 16 bytes at once, all loads before the first use, so that enough bytes are in flight.
#pragma once

#include "kernels.h"
#include "math.cuh"

namespace dpo_kernels::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <class S>
constexpr int kPer = 16 / sizeof(S);  // entries of 16 bytes

template <class S, int kCount>
struct alignas(kCount * sizeof(S)) Pack {
  S at[kCount];
};

// A row of a tile, of sums, or of logits.
template <class S>
struct Row {
  S* data;
  int64_t stride;
  int v;

  __device__ __forceinline__ S& operator[](int i) const { return data[i * stride]; }

  // From entry `head` on, a dense row is `packs` times 16 aligned bytes; entries before and after go one by one.
  __device__ int head() const {
    if (stride != 1) return v;
    return min(v, static_cast<int>((16 - reinterpret_cast<uintptr_t>(data) % 16) % 16 / sizeof(S)));
  }
  __device__ int packs() const { return (v - head()) / kPer<S>; }
};

// Rows one after another, of a tile or of sums.
template <class S>
struct TileRows {
  S* data;
  int64_t stride;
  int v;

  __device__ Row<S> operator[](int64_t row) const { return {data + row * stride, 1, v}; }
};

template <class T, class S, int kCount>
__device__ __forceinline__ void widen_all(const Pack<S, kCount>& pack, T (&x)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = widen(pack.at[k]);
}

// to[i] = what f(x, i) makes of x = row[i], for several entries from i on at once. `to` may begin where the row does:
// if its entries are narrower, then in a row of whole packs that one block has alone. Else `part` of `parts` blocks
// share it.
template <class S, class O, class F>
__device__ __forceinline__ void map_row(const Row<S>& row, const Row<O>& to, int part, int parts, F f) {
  const int head = row.head(), packs = row.packs();
  using T = typename Accumulate<S>::T;
  const auto one = [&](int i) {
    T x[1] = {widen(row[i])};
    f(x, i);
    to[i] = narrow<O>(x[0]);
  };
  if (part == 0) {
    for (int i = threadIdx.x; i < head; i += kThreads) one(i);
    for (int i = head + packs * kPer<S> + threadIdx.x; i < row.v; i += kThreads) one(i);
  }
  const auto* from = reinterpret_cast<const Pack<S, kPer<S>>*>(row.data + head);
  auto* at = reinterpret_cast<Pack<O, kPer<S>>*>(to.data + head);
  const bool aligned = to.stride == 1 && reinterpret_cast<uintptr_t>(at) % sizeof(*at) == 0;
  for (int first = part * kUnroll * kThreads; first < packs; first += parts * kUnroll * kThreads) {
    const int p = first + static_cast<int>(threadIdx.x);
    Pack<S, kPer<S>> read[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (p + j * kThreads < packs) read[j] = from[p + j * kThreads];
    }
    // What is narrower goes to the left of what it comes from: nobody may write before all have read this far.
    if (sizeof(O) < sizeof(S)) __syncthreads();
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (p + j * kThreads >= packs) break;
      const int i = head + (p + j * kThreads) * kPer<S>;
      T x[kPer<S>];
      widen_all(read[j], x);
      f(x, i);
      Pack<O, kPer<S>> written;
#pragma unroll
      for (int k = 0; k < kPer<S>; ++k) written.at[k] = narrow<O>(x[k]);
      if (aligned) {
        at[p + j * kThreads] = written;
      } else {
        for (int k = 0; k < kPer<S>; ++k) to[i + k] = written.at[k];
      }
    }
  }
}

// row[i] = value, by `parts` blocks of which this one is `part`.
template <class S>
__device__ __forceinline__ void fill_row(const Row<S>& row, S value, int part, int parts) {
  const int head = row.head(), packs = row.packs(), first = part * kThreads + threadIdx.x, step = parts * kThreads;
  Pack<S, kPer<S>> filled;
#pragma unroll
  for (S& each : filled.at) each = value;
  for (int i = first; i < head; i += step) row[i] = value;
  for (int i = head + packs * kPer<S> + first; i < row.v; i += step) row[i] = value;
  auto* at = reinterpret_cast<Pack<S, kPer<S>>*>(row.data + head);
  for (int p = first; p < packs; p += step) at[p] = filled;
}

// `blocks` blocks of kThreads for each of n rows.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int64_t n, int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  if (n == 0 || blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(n), static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch of a row kernel");
}

}  // namespace dpo_kernels::cuda

// What the products on Hopper's tensor cores have in common: two blocks that are a cluster, rings of stages that copies
// fill, and matrices as the tensor memory accelerator and wgmma know them.
#pragma once

#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "kernels.h"

namespace dpo_kernels::cuda {

constexpr int kCluster = kClusterBlocks;
constexpr int kGroup = 128;       // threads of a warpgroup
constexpr int kSwizzled = 128;    // bytes of a row in shared memory, whose 16 bytes the copies put in another order
constexpr int kRepeats = 1024;    // bytes after which that order is the same again
constexpr int kMostShared = 227 * 1024;  // bytes that a block of Hopper can have

// A ring of stages, as one of the sides that go round it sees it.
template <int kStages>
struct Ring {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// Names rows of 128 bytes for wgmma, 8 of them every 1024 bytes: rows of 64 terms of the sum; or those of one term and 64
// columns, of which the next 64 come `next_columns` bytes further.
__device__ __forceinline__ uint64_t descriptor(const unsigned char* rows, uint64_t next_columns = 16) {
  return (uint64_t{1} << 62) | (uint64_t{kRepeats / 16} << 32) | (next_columns / 16 << 16) |
         (shared_address(rows) % (1 << 18) / 16);
}
// What makes a descriptor that of the next 16 terms, in rows of terms and of columns.
constexpr uint64_t kNextTerms = 16 * 2 / 16, kNextTermsOfColumns = 16 * kSwizzled / 16;

// Items (first, second) in an order in which kTogether of the first take turns with the same second, so that what these
// read stays in the second-level cache.
template <int kTogether>
__device__ __forceinline__ int2 by_turns(int i, int firsts, int seconds) {
  const int group = i / (kTogether * seconds), in_group = i % (kTogether * seconds);
  const int here = min(kTogether, firsts - group * kTogether);
  return {group * kTogether + in_group % here, in_group / here};
}

// Boxes of `rows` rows by `columns` columns; what lies outside of the matrix is read as 0, and not written. They are
// swizzled but for those of fp32.
inline CUtensorMap tensor_map(CUtensorMapDataType type, const Matrix& m, int rows, int columns) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled of the driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) throw std::runtime_error("CUDA: this driver has no cuTensorMapEncodeTiled");
  CUtensorMap map;
  const bool wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(m.stride) * (wide ? 4 : 2)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows)}, step[2] = {1, 1};
  const CUresult status = encode(&map, type, 2, m.data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 wide ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled refuses a matrix, error " + std::to_string(status));
  }
  return map;
}

inline int blocks_of(int64_t size, int of) { return static_cast<int>((size + of - 1) / of); }

// So many clusters of blocks that take so many bytes of shared memory.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int clusters, int threads, int shared_bytes, cudaStream_t stream,
                     const char* what, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace dpo_kernels::cuda

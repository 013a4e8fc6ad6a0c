// Kernels that show what the emulation does; test_emulation.py calls them. Functions return null or what went wrong.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

using namespace dpo_kernels;

namespace {

std::string message;

template <class Function>
const char* guarded(Function function) {
  try {
    const cudaError_t error = function();
    if (error == cudaSuccess) return nullptr;
    message = cudaGetErrorString(error);
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, unsigned cluster, size_t shared,
                   Arguments... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, const void* data, uint64_t rows, uint64_t columns,
                uint64_t stride, uint32_t box_rows, uint32_t box_columns, CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  const cuuint64_t dims[2] = {columns, rows}, strides[1] = {stride};
  const cuuint32_t box[2] = {box_columns, box_rows}, steps[2] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, type, 2, const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// out[y, x]: the sum of the x-th `width` columns of row y.
__global__ void block_sums(const float* in, float* out, int width, bool synchronized) {
  __shared__ float sums[32];
  const int warps = static_cast<int>(blockDim.x) / 32;
  const float* row = in + (static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x) * width;
  float x = 0;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) x += __ldg(row + i);
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  if (synchronized) __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < warps; ++i) x += sums[i];
  out[blockIdx.y * gridDim.x + blockIdx.x] = x;
}

template <class T>
__global__ void shuffles(const T* in, T* out, unsigned* votes) {
  const T x = in[threadIdx.x];
  const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0xffff : 0xffff0000;
  out[t] = __shfl_xor_sync(~0u, x, 5);
  out[64 + t] = __shfl_sync(~0u, x, 3);
  out[128 + t] = __shfl_down_sync(~0u, x, 7);
  out[192 + t] = __shfl_up_sync(half, x, 2, 16);
  votes[t] = __ballot_sync(~0u, x > 0);
  votes[64 + t] = static_cast<unsigned>(__any_sync(half, x > 20));
}

// out [rows, 256] = a [rows, depth] b [256, depth]^T in blocks of 64 rows: a warpgroup multiplies, a warp copies, and
// the blocks of a cluster share the copies of b.
enum Mistake {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kReleaseEarly,
  kNoRelease,
  kReadEarly,
  kWriteEarly,
  kNoFence,
  kNoClusterSync
};
constexpr int kStages = 2, kATile = 64 * 128, kBTile = 256 * 128, kStage = kATile + kBTile;
constexpr int kProductShared = kStages * (kStage + 2 * static_cast<int>(sizeof(Barrier)));

__device__ uint64_t descriptor(const void* rows) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{shared_address(rows) / 16};
}

template <class T, int kCluster>
__global__ void __launch_bounds__(160)
    product(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* out, int rows,
            int steps, Mistake mistake) {
  unsigned char* memory = shared_memory();
  Barrier *full = reinterpret_cast<Barrier*>(memory + kStages * kStage), *empty = full + kStages;
  const int rank = static_cast<int>(cluster_rank()), t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, kCluster);
    }
    fence_barrier_init();
  }
  if (mistake != kNoClusterSync) cluster_sync();
  if (t >= 128) {
    for (int step = 0; t == 128 && step < steps; ++step) {
      const int stage = step % kStages, part = 256 / kCluster;
      if (mistake != kNoEmptyWait) barrier_wait(empty + stage, (step / kStages & 1) ^ 1);
      barrier_expect(full + stage, kStage);
      copy_box(memory + stage * kStage, a_map, full + stage, step * 64, static_cast<int>(blockIdx.x) * 64);
      unsigned char* b = memory + stage * kStage + kATile + rank * part * 128;
      if (kCluster == 1) {
        copy_box(b, b_map, full + stage, step * 64, 0);
      } else {
        copy_box_to_cluster(b, b_map, full + stage, step * 64, rank * part, (1 << kCluster) - 1);
      }
    }
  } else {
    float acc[128];
    const auto release = [&](int stage) {
      if (t < kCluster && mistake != kNoRelease) barrier_arrive_at(empty + stage, static_cast<uint32_t>(t));
    };
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      if (mistake != kNoFullWait) barrier_wait(full + stage, step / kStages & 1);
      const uint64_t a = descriptor(memory + stage * kStage), b = descriptor(memory + stage * kStage + kATile);
      if (mistake != kNoFence) wgmma_fence();
      for (uint64_t k = 0; k < 4; ++k) wgmma<T, 256>(acc, a + 2 * k, b + 2 * k, step > 0 || k > 0);
      wgmma_commit();
      if (mistake == kReleaseEarly) {
        release(stage);
        if (step + 1 == steps) wgmma_wait<0>();
      } else if (mistake == kReadEarly && step + 1 == steps) {
        wgmma_wait<1>();
      } else if (step > 0) {
        wgmma_wait<1>();
        release((step - 1) % kStages);
      }
    }
    if (mistake == kWriteEarly) acc[0] = 1;
    if (mistake != kReleaseEarly && mistake != kReadEarly) {
      wgmma_wait<0>();
      release((steps - 1) % kStages);
    }
    for (int i = 0; i < 128; ++i) {
      const int row = static_cast<int>(blockIdx.x) * 64 + 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2);
      if (row < rows) out[row * 256 + 8 * (i / 4) + 2 * (t % 4) + i % 2] = acc[i];
    }
    if (mistake == kReadEarly) {
      wgmma_wait<0>();
      release((steps - 2) % kStages);
      release((steps - 1) % kStages);
    }
  }
  cluster_sync();
}

template <class T, int kCluster>
cudaError_t run_product(CUtensorMapDataType type, const void* a, const void* b, float* out, int rows, int depth,
                        Mistake mistake) {
  CUtensorMap a_map, b_map;
  const uint64_t stride = static_cast<uint64_t>(depth) * 2;
  if (encode(&a_map, type, a, rows, depth, stride, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B) != CUDA_SUCCESS ||
      encode(&b_map, type, b, 256, depth, stride, 256 / kCluster, 64, CU_TENSOR_MAP_SWIZZLE_128B) != CUDA_SUCCESS) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = product<T, kCluster>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kProductShared);
  const unsigned blocks = static_cast<unsigned>((rows + 63) / 64 + kCluster - 1) / kCluster * kCluster;
  const int steps = (depth + 63) / 64;
  return launch(kernel, dim3(blocks), 160, kCluster, kProductShared, a_map, b_map, out, rows, steps, mistake);
}

// out [64, 256] = a b for b [depth, 256], whose rows of 64 columns come in four boxes. a [64, depth], or transposed
// [depth, 64], goes through registers, two sets of which take turns.
enum RegisterMistake { kRegistersRight, kStrideAndLeading, kNoLeading, kRewriteEarly, kKMajor };
constexpr int kRegisterStage = 5 * 64 * 128, kRegisterShared = 2 * kRegisterStage + 2 * static_cast<int>(sizeof(Barrier));

template <bool kTransposed>
__global__ void __launch_bounds__(128)
    product_of_registers(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* out,
                         int steps, RegisterMistake mistake) {
  unsigned char* memory = shared_memory();
  Barrier* full = reinterpret_cast<Barrier*>(memory + 2 * kRegisterStage);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, matrix = lane / 8;
  if (t == 0) {
    barrier_init(full, 1);
    barrier_init(full + 1, 1);
    fence_barrier_init();
  }
  __syncthreads();
  const uint64_t next = mistake == kStrideAndLeading ? 1024 : mistake == kNoLeading ? 16 : 64 * 128;
  const uint64_t stride = mistake == kStrideAndLeading ? 64 * 128 : 1024;
  float acc[128];
  uint32_t a[2][4][4];
  for (int step = 0; step < steps; ++step) {
    unsigned char *stage = memory + step % 2 * kRegisterStage, *b = stage + 64 * 128;
    if (t == 0) {  // what it had before was waited for
      barrier_expect(full + step % 2, kRegisterStage);
      copy_box(stage, a_map, full + step % 2, kTransposed ? 0 : step * 64, kTransposed ? step * 64 : 0);
      for (int box = 0; box < 4; ++box) copy_box(b + box * 64 * 128, b_map, full + step % 2, box * 64, step * 64);
    }
    barrier_wait(full + step % 2, step / 2 & 1);
    for (int k = 0; k < 4; ++k) {
      const int line = kTransposed ? 16 * k + 8 * (matrix / 2) + lane % 8 : 16 * (t / 32) + 8 * (matrix % 2) + lane % 8;
      const int chunk = kTransposed ? 2 * (t / 32) + matrix % 2 : 2 * k + matrix / 2;
      load_matrices<kTransposed>(a[step % 2][k], stage + line * 128 + (chunk ^ line % 8) * 16);
    }
    wgmma_fence();
    const uint64_t at = uint64_t{1} << 62 | stride / 16 << 32 | next / 16 << 16 | shared_address(b) / 16;
    for (int k = 0; k < 4; ++k) {
      if (mistake == kKMajor) {
        wgmma<__nv_bfloat16, 256>(acc, descriptor(stage) + 2 * k, at + 2 * k, step > 0 || k > 0);
      } else {
        wgmma_of_registers<256>(acc, a[step % 2][k], at + 128 * k, step > 0 || k > 0);
      }
    }
    wgmma_commit();
    if (mistake == kRewriteEarly) a[step % 2][3][0] ^= 0x3f80;
    step + 1 < steps ? wgmma_wait<1>() : wgmma_wait<0>();
  }
  for (int i = 0; i < 128; ++i) {
    out[(16 * (t / 32) + lane / 4 + 8 * (i / 2 % 2)) * 256 + 8 * (i / 4) + 2 * (t % 4) + i % 2] = acc[i];
  }
}

template <bool kTransposed>
cudaError_t run_product_of_registers(const void* a, const void* b, float* out, int depth, RegisterMistake mistake) {
  CUtensorMap a_map, b_map;
  const auto type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const uint64_t d = static_cast<uint64_t>(depth), rows = kTransposed ? d : 64, columns = kTransposed ? 64 : d;
  if (encode(&a_map, type, a, rows, columns, 2 * columns, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B) != CUDA_SUCCESS ||
      encode(&b_map, type, b, d, 256, 512, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B) != CUDA_SUCCESS) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = product_of_registers<kTransposed>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRegisterShared);
  return launch(kernel, dim3(1), 128, 1, kRegisterShared, a_map, b_map, out, (depth + 63) / 64, mistake);
}

// A box of 8 rows by 32 columns as it lies in shared memory.
__global__ void box(const __grid_constant__ CUtensorMap map, float* out, int column, int row) {
  Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + 1024);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, 1024);
    copy_box(shared_memory(), map, barrier, column, row);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) out[i] = reinterpret_cast<float*>(shared_memory())[i];
}

// out [columns, rows], of which `out_map` knows a part, becomes in [64, columns]^T by way of one piece of shared memory
// for 64 columns at a time.
enum StoreMistake { kStoreRight, kNoStoreFence, kNoStoreWait, kNoStoreEnd, kStoreUnaligned };

__global__ void __launch_bounds__(128)
    transpose(const __grid_constant__ CUtensorMap out_map, const uint16_t* in, int columns, StoreMistake mistake) {
  unsigned char* piece = shared_memory();
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, matrix = lane / 8;
  for (int first = 0; first < columns; first += 64) {
    if (t == 0 && mistake != kNoStoreWait) stores_wait<0>();
    group_sync(1);
    for (int j = 0; j < 8; j += 2) {
      uint32_t numbers[4];
      for (int i = 0; i < 4; ++i) {
        const int row = t / 32 * 16 + lane / 4 + 8 * (i % 2), column = first + 8 * (j + i / 2) + 2 * (lane % 4);
        memcpy(&numbers[i], in + row * columns + column, 4);
      }
      const int chunk = t / 32 * 2 + matrix % 2, line = 8 * (j + matrix / 2) + lane % 8;
      const int at = line * 128 + (chunk ^ line % 8) * 16 + (mistake == kStoreUnaligned ? 8 : 0);
      store_transposed(piece + at, numbers);
    }
    if (mistake != kNoStoreFence) fence_before_stores();
    group_sync(1);
    if (t == 0) {
      store_box(out_map, piece, -8, first - 16);  // beyond the beginning, and beyond the end
      stores_commit();
    }
  }
  if (t == 0 && mistake != kNoStoreEnd) stores_wait<0>();
}

enum Fault {
  kNoFault,
  kMissingThread,
  kMissingArrival,
  kMissingLane,
  kForeignLane,
  kTwoMeetings,
  kNotInitialized,
  kTooManyArrivals,
  kPastTheEnd,
  kUnaligned,
  kFaults
};

__global__ void faulty(Fault fault) {
  Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory());
  const unsigned t = threadIdx.x;
  if (fault == kNotInitialized) barrier_arrive(barrier);
  if (t == 0) barrier_init(barrier, 2);
  __syncthreads();
  if (fault == kMissingLane && t == 3) return;
  if (fault == kPastTheEnd && t == 0) shared_memory()[64] = 1;
  if (fault == kUnaligned && t == 0) barrier_init(reinterpret_cast<Barrier*>(shared_memory() + 12), 1);
  if (fault == kForeignLane) __shfl_sync(0xffff, 1, 0);
  if (fault == kTwoMeetings && t % 2 == 0) __syncwarp();
  __shfl_sync(~0u, 1, 0);
  if (fault == kMissingThread && t == 40) return;
  if (fault == kTooManyArrivals && t == 0) {
    for (int i = 0; i < 3; ++i) barrier_expect(barrier, 16);
  }
  if (t < 2 && !(fault == kMissingArrival && t == 1)) barrier_arrive(barrier);
  barrier_wait(barrier, 0);
  __syncthreads();
}

__global__ void nothing() {}

}  // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT const char* run_block_sums(const float* in, float* out, unsigned x, unsigned y, unsigned threads, int width,
                                  bool synchronized) {
  return guarded([&] { return launch(block_sums, dim3(x, y), threads, 1, 0, in, out, width, synchronized); });
}

EXPORT const char* run_shuffles(int type, const void* in, void* out, unsigned* votes) {
  return guarded([&] {
    const auto run = [&](auto x) {
      using T = decltype(x);
      return launch(shuffles<T>, dim3(1), 64, 1, 0, static_cast<const T*>(in), static_cast<T*>(out), votes);
    };
    return type == 0 ? run(int()) : type == 1 ? run(float()) : type == 2 ? run(double()) : run((long long)0);
  });
}

EXPORT const char* run_product(bool half, unsigned cluster, const void* a, const void* b, float* out, int rows,
                               int depth, int mistake) {
  return guarded([&] {
    const auto run = half ? (cluster == 1 ? run_product<__half, 1> : run_product<__half, 2>)
                          : (cluster == 1 ? run_product<__nv_bfloat16, 1> : run_product<__nv_bfloat16, 2>);
    const auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return run(type, a, b, out, rows, depth, static_cast<Mistake>(mistake));
  });
}

EXPORT const char* run_product_of_registers(bool transposed, const void* a, const void* b, float* out, int depth,
                                            int mistake) {
  return guarded([&] {
    const auto run = transposed ? run_product_of_registers<true> : run_product_of_registers<false>;
    return run(a, b, out, depth, static_cast<RegisterMistake>(mistake));
  });
}

EXPORT const char* run_box(const float* in, float* out, int rows, int columns, int stride, int column, int row,
                           bool swizzled) {
  return guarded([&] {
    CUtensorMap map;
    const auto status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, in, rows, columns, stride * 4ull, 8, 32,
                               swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE);
    if (status != CUDA_SUCCESS) return cudaErrorInvalidValue;
    return launch(box, dim3(1), 64, 1, 1024 + 8, map, out, column, row);
  });
}

EXPORT const char* run_transpose(const uint16_t* in, void* out, int rows, int columns, int stride, int in_columns,
                                 int mistake) {
  return guarded([&] {
    CUtensorMap map;
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, out, rows, columns, stride * 2ull, 64, 64,
               CU_TENSOR_MAP_SWIZZLE_128B) != CUDA_SUCCESS) {
      return cudaErrorInvalidValue;
    }
    return launch(transpose, dim3(1), 128, 1, 64 * 128 + 16, map, in, in_columns, static_cast<StoreMistake>(mistake));
  });
}

EXPORT int run_encode(uint64_t address, uint64_t rows, uint64_t columns, uint64_t stride, uint32_t box_rows,
                      uint32_t box_columns) {
  CUtensorMap map;
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, reinterpret_cast<const void*>(address), rows, columns, stride,
                box_rows, box_columns, CU_TENSOR_MAP_SWIZZLE_128B);
}

EXPORT const char* run_faulty(int fault) {
  return guarded([&] { return launch(faulty, dim3(1), 64, 1, 64, static_cast<Fault>(fault)); });
}

EXPORT const char* run_nothing(unsigned grid, unsigned threads, unsigned cluster, size_t shared, int allowed) {
  return guarded([&] {
    const cudaError_t error = cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
    return error != cudaSuccess ? error : launch(nothing, dim3(grid), threads, cluster, shared);
  });
}

EXPORT void convert(bool half, const float* in, uint16_t* narrow, float* wide, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    narrow[i] = half ? __float2half_rn(in[i]).bits : __float2bfloat16_rn(in[i]).bits;
    wide[i] = half ? __half2float({narrow[i]}) : __bfloat162float({narrow[i]});
  }
}
}

// Path A in one kernel, for sm_90a alone: a matrix product whose epilogue folds each tile of logits in registers and
// stores none.
//
// Dimensions: N labelled rows, H hidden size, V vocabulary size. A block has kRows rows and takes kColumns vocabulary
// entries at a time, kDepth of H at a time; a tile of x and one of W are a stage of kStages.
//
// Of a block's three warpgroups the first copies and the other two have 64 rows each: multiply, then fold. They
// wait for data alone, and kStages let one fold while the other still multiplies. Two blocks are a cluster: other rows,
// the same columns, and each copies half of W's tile into both. Clusters stay, and go through work items of (two blocks
// of rows, one split of the vocabulary); at the end of an item its rows' maximum and sums are written, and
// `join_kernel` puts the splits together in one order. No atomics.
//
// For u = +-(x.W + b), or tanh of it, with the sign that makes z = outer * u rise with u, a row keeps max u and
// sum exp(outer (u - max)): the scale costs nothing, and `join_kernel` multiplies in fp64.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "hopper.cuh"
#include "kernels.h"
#include "math.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kCluster = kClusterBlocks;
constexpr int kRows = kClusterRows / kCluster, kColumns = kBlockColumns, kDepth = 64, kStages = 4;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kFolders = 2, kThreads = (1 + kFolders) * kGroup;
constexpr int kRowBytes = kDepth * 2;  // of a tile, which is one row of the 128-byte swizzle
constexpr int kXBytes = kRows * kRowBytes, kWBytes = kColumns * kRowBytes, kStageBytes = kXBytes + kWBytes;
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStages * static_cast<int>(sizeof(Barrier));
static_assert(kSharedBytes + 1024 <= 228 * 1024, "more shared memory than a multiprocessor of Hopper has");
// So many pairs of blocks of rows take turns with the same columns, so that their x stays in the second-level cache.
constexpr int kRowPairsTogether = 8;
constexpr int kEntries = kColumns / 4;  // of one row that a thread has: two rows, a quarter of each

// The work items and their order, the same for all threads.
struct Schedule {
  int row_pairs, splits, column_blocks;

  __device__ int items() const { return row_pairs * splits; }

  struct Item {
    int row_pair, split, first, last;  // blocks of columns [first, last)
  };
  __device__ Item operator[](int i) const {
    const int together = kRowPairsTogether * splits, group = i / together, in_group = i % together;
    const int pairs = min(kRowPairsTogether, row_pairs - group * kRowPairsTogether);
    const int split = in_group / pairs;
    return {group * kRowPairsTogether + in_group % pairs, split, boundary(split), boundary(split + 1)};
  }
  __device__ int boundary(int split) const {
    return static_cast<int>(static_cast<int64_t>(split) * column_blocks / splits);
  }
};

// A ring of stages, as one of the sides that go round it sees it.
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  __device__ void next() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

struct Shared {
  unsigned char* memory;

  __device__ unsigned char* x(int stage) const { return memory + stage * kStageBytes; }
  __device__ unsigned char* w(int stage) const { return x(stage) + kXBytes; }
  __device__ Barrier* full(int stage) const {
    return reinterpret_cast<Barrier*>(memory + kStages * kStageBytes) + stage;
  }
  __device__ Barrier* empty(int stage) const { return full(stage) + kStages; }
};

// Names rows of 128 swizzled bytes that begin at `rows`, 8 of them every 1024 bytes.
__device__ __forceinline__ uint64_t descriptor(const unsigned char* rows) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) |
         (shared_address(rows) % (1 << 18) / 16);
}
// The next 16 entries of H.
constexpr uint64_t kNextTerms = 16 * 2 / 16;

__device__ void copy_tiles(const CUtensorMap& x_map, const CUtensorMap& w_map, const Shared& shared, Schedule schedule,
                           int depths) {
  constexpr int half = kColumns / kCluster;
  const int rank = static_cast<int>(cluster_rank()), clusters = static_cast<int>(gridDim.x) / kCluster;
  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < schedule.items(); i += clusters) {
    const Schedule::Item item = schedule[i];
    const int row = (item.row_pair * kCluster + rank) * kRows;
    for (int block = item.first; block < item.last; ++block) {
      for (int depth = 0; depth < depths; ++depth, stage.next()) {
        barrier_wait(shared.empty(stage.index), stage.parity ^ 1);  // in both blocks
        barrier_expect(shared.full(stage.index), kStageBytes);
        copy_box(shared.x(stage.index), x_map, shared.full(stage.index), depth * kDepth, row);
        copy_box_to_cluster(shared.w(stage.index) + rank * half * kRowBytes, w_map, shared.full(stage.index),
                            depth * kDepth, block * kColumns + rank * half, (1 << kCluster) - 1);
      }
    }
  }
}

// What a thread has seen of one row: a quarter of the columns, beside the label.
template <bool kStats>
struct PartFold {
  float top = -FLT_MAX, target = -INFINITY, sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0;
  int argmax = -1;

  // u[k] for the column first + 8 (k / 2) + k % 2; -inf does not count. outer_log2e: what makes u a power of two.
  template <class U>
  __device__ __forceinline__ void add(const U& u, int first, float outer_log2e) {
    float most[4] = {u(0), u(1), u(2), u(3)};  // each in turn, so that none waits for the one before
#pragma unroll
    for (int k = 4; k < kEntries; ++k) most[k % 4] = fmaxf(most[k % 4], u(k));
    const float block = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    const float next = fmaxf(top, block), rescale = exp2f((top - next) * outer_log2e);
    if (kStats) {
      if (block > top) {
#pragma unroll
        for (int k = kEntries - 1; k >= 0; --k) argmax = u(k) == block ? first + 8 * (k / 2) + k % 2 : argmax;
      }
      sum_ez = (sum_ez + sum * fmaxf(top - next, -FLT_MAX)) * rescale;
      sum_sq *= rescale * rescale;
    }
    top = next;
    float part[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const float shifted = u(k) - next, e = exp2f(shifted * outer_log2e);
      part[k % 2] += e;
      if (kStats) {
        // 0 times -inf is to be 0
        sum_ez += e * fmaxf(shifted, -FLT_MAX);
        sum_sq += e * e;
      }
    }
    sum = sum * rescale + (part[0] + part[1]);
  }

  // The same of all four threads of a row.
  __device__ __forceinline__ void join(float outer_log2e) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, top, distance), next = fmaxf(top, other);
      const float factor = exp2f((top - next) * outer_log2e);
      if (kStats) {
        const int index = __shfl_xor_sync(kAllLanes, argmax, distance);
        const bool take = other > top || (other == top && index >= 0 && (index < argmax || argmax < 0));
        argmax = take ? index : argmax;
        sum_ez = (sum_ez + sum * fmaxf(top - next, -FLT_MAX)) * factor;
        sum_ez += __shfl_xor_sync(kAllLanes, sum_ez, distance);
        sum_sq *= factor * factor;
        sum_sq += __shfl_xor_sync(kAllLanes, sum_sq, distance);
        sum_z += __shfl_xor_sync(kAllLanes, sum_z, distance);
      }
      sum *= factor;
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
      const float other_target = __shfl_xor_sync(kAllLanes, target, distance);
      target = target == -INFINITY ? other_target : target;  // one of the four has it
      top = next;
    }
  }
};

struct Output {
  float* part;
  int64_t* argmax;
  int64_t n;
  int splits;

  template <bool kStats>
  __device__ __forceinline__ void write(const PartFold<kStats>& fold, int64_t row, int split) const {
    const int64_t at = split * n + row, field = splits * n;
    part[kPartMax * field + at] = fold.top;
    part[kPartTarget * field + at] = fold.target;
    part[kPartSum * field + at] = fold.sum;
    if (kStats) {
      part[kPartSumZ * field + at] = fold.sum_z;
      part[kPartSumEz * field + at] = fold.sum_ez;
      part[kPartSumSq * field + at] = fold.sum_sq;
      argmax[at] = fold.argmax;
    }
  }
};

struct Problem {
  const int64_t* y;
  const void* bias;  // or null
  int64_t n;
  int v, depths;
  float inner, outer;  // outer > 0; inner is of either sign
  Schedule schedule;
  Output out;
};

template <class T, bool kCapped, bool kStats>
__device__ void multiply_and_fold(const Problem& p, const Shared& shared) {
  const int thread = static_cast<int>(threadIdx.x) % kGroup, lane = thread % 32;
  const int folder = static_cast<int>(threadIdx.x) / kGroup - 1;
  const int row_in_block = folder * 64 + thread / 32 * 16 + lane / 4;
  const int rank = static_cast<int>(cluster_rank()), clusters = static_cast<int>(gridDim.x) / kCluster;
  const float outer_log2e = p.outer * kLog2E;
  const T* bias = static_cast<const T*>(p.bias);
  const auto release = [&](int stage) {  // to both blocks, which fill it with their halves of W
    if (lane < kCluster) barrier_arrive_at(shared.empty(stage), lane);
  };

  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < p.schedule.items(); i += clusters) {
    const Schedule::Item item = p.schedule[i];
    const int64_t row = static_cast<int64_t>(item.row_pair * kCluster + rank) * kRows + row_in_block;
    PartFold<kStats> fold[2];  // of `row` and row + 8
    int label[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) label[r] = row + 8 * r < p.n ? static_cast<int>(p.y[row + 8 * r]) : -1;

    for (int block = item.first; block < item.last; ++block) {
      float acc[kColumns / 2];
      int before = 0;
      for (int depth = 0; depth < p.depths; ++depth, stage.next()) {
        barrier_wait(shared.full(stage.index), stage.parity);
        const uint64_t a = descriptor(shared.x(stage.index) + folder * 64 * kRowBytes);
        const uint64_t b = descriptor(shared.w(stage.index));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          wgmma<T, kColumns>(acc, a + k * kNextTerms, b + k * kNextTerms, depth > 0 || k > 0);
        }
        wgmma_commit();
        if (depth > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = stage.index;
      }
      wgmma_wait<0>();
      wgmma_results(acc);
      release(before);

      const int first = block * kColumns + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) {
        float& u = acc[j];
        if (bias != nullptr) {
          const int column = first + 8 * (j / 4) + j % 2;
          if (column < p.v) u += widen(bias[column]);
        }
        float slope;
        if (kCapped) {
          u = tanh_of(u * p.inner, slope);
        } else if (p.inner < 0) {
          u = -u;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto u = [&](int k) -> float& { return acc[4 * (k / 2) + 2 * r + k % 2]; };
        if ((block + 1) * kColumns > p.v) {  // the last block; its columns beyond V count for nothing
#pragma unroll
          for (int k = 0; k < kEntries; ++k) {
            const bool inside = first + 8 * (k / 2) + k % 2 < p.v;
            if (kStats) fold[r].sum_z += inside ? u(k) : 0;
            u(k) = inside ? u(k) : -INFINITY;
          }
        } else if (kStats) {
#pragma unroll
          for (int k = 0; k < kEntries; ++k) fold[r].sum_z += u(k);
        }
        if (label[r] >= block * kColumns && label[r] < (block + 1) * kColumns) {
#pragma unroll
          for (int k = 0; k < kEntries; ++k) {
            if (first + 8 * (k / 2) + k % 2 == label[r]) {
              fold[r].target = u(k);
              u(k) = -INFINITY;
            }
          }
        }
        fold[r].add(u, first, outer_log2e);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      fold[r].join(outer_log2e);
      if (lane % 4 == 0 && row + 8 * r < p.n) p.out.write(fold[r], row + 8 * r, item.split);
    }
  }
}

template <class T, bool kCapped, bool kStats>
__global__ void __launch_bounds__(kThreads, 1)
    linear_fold_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                       const Problem p) {
  const Shared shared{shared_memory()};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kCluster * kFolders * kGroup / 32);  // by every warp that reads it
    }
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x < kGroup) {
    registers_decrease<40>();
    if (threadIdx.x == 0) copy_tiles(x_map, w_map, shared, p.schedule, p.depths);
    __syncwarp();
  } else {
    registers_increase<232>();
    multiply_and_fold<T, kCapped, kStats>(p, shared);
  }
  cluster_sync();  // the other block may still write here, and arrive at barriers
}

// One thread a row.
template <bool kStats>
__global__ void join_kernel(Output parts, double outer, FoldState state) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= parts.n) return;
  const int64_t field = parts.splits * parts.n;
  const auto at = [&](int f, int split) -> double { return parts.part[f * field + split * parts.n + n]; };
  double top = -FLT_MAX, target = -INFINITY, sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0;
  int64_t argmax = -1;
  for (int split = 0; split < parts.splits; ++split) {
    top = larger(top, at(kPartMax, split));
    if (target == -INFINITY) target = at(kPartTarget, split);  // which one split has
  }
  for (int split = 0; split < parts.splits; ++split) {
    const double apart = outer * (at(kPartMax, split) - top), factor = exp(apart);
    sum += at(kPartSum, split) * factor;
    if (kStats) {
      sum_z += at(kPartSumZ, split);
      sum_ez += (outer * at(kPartSumEz, split) + at(kPartSum, split) * apart) * factor;
      sum_sq += at(kPartSumSq, split) * factor * factor;
      const int64_t place = parts.argmax[split * parts.n + n];
      if (argmax < 0 && apart == 0) argmax = place;
    }
  }
  // a row without another entry than the label's keeps the maximum that it began with
  if (top > -FLT_MAX) state.data[kMax * state.stride + n] = outer * top;
  state.data[kTarget * state.stride + n] = outer * target;
  state.data[kSum * state.stride + n] = sum;
  if (kStats) {
    state.data[kSumZ * state.stride + n] = outer * sum_z;
    state.data[kSumEz * state.stride + n] = sum_ez;
    state.data[kSumSq * state.stride + n] = sum_sq;
    state.argmax[n] = argmax;
  }
}

// Boxes of `rows` rows by kDepth columns, swizzled; what lies outside of the matrix is 0.
CUtensorMap tensor_map(DType type, const Matrix& m, int rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled of the driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) throw std::runtime_error("CUDA: this driver has no cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(m.stride) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(rows)}, step[2] = {1, 1};
  const CUresult status =
      encode(&map, type == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, m.data,
             size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA: cuTensorMapEncodeTiled refuses a matrix, error " + std::to_string(status));
  }
  return map;
}

template <class T, bool kCapped, bool kStats>
void launch(const CUtensorMap& x, const CUtensorMap& w, const Problem& p, int processors, cudaStream_t stream) {
  const auto kernel = linear_fold_kernel<T, kCapped, kStats>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "shared memory of the fused forward");
  const int clusters = std::min(p.schedule.row_pairs * p.schedule.splits, std::max(1, processors / kCluster));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, x, w, p), "launch of the fused forward");
}

}  // namespace

void linear_fold(DType type, const LinearFold& args, const FoldState& state, bool stats, int processors,
                 cudaStream_t stream) {
  const Logit<double> logit(args.transform);
  const auto blocks = [](int64_t size, int of) { return static_cast<int>((size + of - 1) / of); };
  const Output out{args.part, args.part_argmax, args.x.rows, args.splits};
  Problem p{args.y,
            args.bias,
            args.x.rows,
            static_cast<int>(args.w.rows),
            blocks(args.x.columns, kDepth),
            static_cast<float>(logit.capped ? logit.inner : logit.outer),
            static_cast<float>(std::fabs(logit.outer)),
            Schedule{blocks(args.x.rows, kRows * kCluster), args.splits, blocks(args.w.rows, kColumns)},
            out};
  const CUtensorMap x = tensor_map(type, args.x, kRows), w = tensor_map(type, args.w, kColumns / kCluster);
  const auto with = [&](auto t) {
    using T = decltype(t);
    const auto run = logit.capped ? (stats ? launch<T, true, true> : launch<T, true, false>)
                                  : (stats ? launch<T, false, true> : launch<T, false, false>);
    run(x, w, p, processors, stream);
  };
  type == DType::bf16 ? with(__nv_bfloat16()) : with(__half());
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks(args.x.rows, 128));
  config.blockDim = dim3(128);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, stats ? join_kernel<true> : join_kernel<false>, out, std::fabs(logit.outer), state),
        "launch of the fused forward's second kernel");
}

}  // namespace dpo_kernels::cuda

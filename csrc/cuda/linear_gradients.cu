// The gradients of a head from packed exponentials, for sm_90a alone: dX = d^T W and dW = d x, whose d is never stored.
// A product reads the exponentials E as they are, [V, N] in fp16, and weighs them between shared memory and the tensor
// cores, in registers:
//
//   d[v, n] = bf16(E[v, n] factor[block of v, n]), and in dW bf16(own[n]) where v is the label of row n and E is 0.
//
// Dimensions: N labelled rows, H hidden size, V vocabulary size. A result has M rows, which are labelled ones (dX) or
// vocabulary entries (dW), and H columns; its sums have K terms, which are the others of these two. A block has a tile of
// kRows x kColumns and takes kDepth terms at a time: a tile of E and one of W or x are a stage of kStages.
//
// Of a block's three warpgroups the first copies and the other two have 64 rows each. Such a group weighs the terms of
// one stage while the tensor cores multiply those of the stage before: the registers of two stages take turns. Two
// blocks are a cluster: other rows, the same columns, and each copies half of W's or x's tile into both. Clusters stay,
// and go through tiles of the result in turns. No atomics: each entry is summed by one thread, in one order.
//
// What is read how often: clusters that run side by side have about kPairsTogether pairs of blocks of rows and as many
// blocks of columns, so that a pair's part of E is read once for these columns, H / 2048 times in all, and W or x once
// for 2048 rows of the result. A tile reads 32 KB a stage through the second-level cache, as linear_fold.cu does.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "clusters.cuh"
#include "exponentials.cuh"
#include "math.cuh"
#include "row.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kRows = kClusterRows / kCluster, kColumns = 256, kDepth = 64, kStages = 4;
constexpr int kMultipliers = 2, kGroupRows = kRows / kMultipliers, kBlockThreads = (1 + kMultipliers) * kGroup;
// Boxes of 64 rows of memory, 64 numbers each: two of E, or one of twice as many rows; four of W or x.
constexpr int kBox = 64, kBoxBytes = kBox * kSwizzled;
constexpr int kEBytes = kRows * kDepth * 2, kOtherBytes = kColumns * kDepth * 2, kStageBytes = kEBytes + kOtherBytes;
static_assert(kGroupRows * kDepth * 2 == kBoxBytes && kOtherBytes % (kCluster * kBoxBytes) == 0);
// Beside these: factors of kRows rows; or factors, labels and own entries of kDepth rows.
constexpr int kWeightsBytes = 1024;
constexpr int kSharedBytes = kStages * (kStageBytes + kWeightsBytes + 2 * static_cast<int>(sizeof(Barrier)));
static_assert(kSharedBytes <= kMostShared);
static_assert(kBlockColumns % kRows == 0 && kBlockColumns % kDepth == 0, "one factor a row and tile, or a row and stage");
constexpr int kPairsTogether = 8;

enum class Of { hidden, weight };

using Stage = Ring<kStages>;

struct Shared {
  unsigned char* memory;

  __device__ unsigned char* e(int stage) const { return memory + stage * kStageBytes; }
  __device__ unsigned char* other(int stage) const { return e(stage) + kEBytes; }
  __device__ float* weights(int stage) const {
    return reinterpret_cast<float*>(memory + kStages * kStageBytes + stage * kWeightsBytes);
  }
  __device__ Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(weights(kStages)) + stage; }
  __device__ Barrier* empty(int stage) const { return full(stage) + kStages; }
};

struct Problem {
  int clusters, row_pairs, column_blocks, steps;
  int parts;  // of the sums of dX, computed side by side, each with a result of its own
  int rows, columns;  // of the result
  void* out;          // or null
  int64_t stride;
  bool add;
  float* bias;  // [rows], of dW: sums of d
  // Where the exponentials begin in the vocabulary, and among blocks of factors; of dX, the second ones too, whose steps
  // come behind `steps_of_first`.
  int first, first_block, second, second_block, steps_of_first;

  __device__ int tiles() const { return row_pairs * column_blocks * parts; }
  struct Tile {
    int row, column, part, first, last;  // steps [first, last)
  };
  // Of this block.
  __device__ Tile tile(int i) const {
    const auto [pair, other] = by_turns<kPairsTogether>(i, row_pairs, column_blocks * parts);
    const int part = other / column_blocks, column = other % column_blocks;
    const auto boundary = [&](int of) { return static_cast<int>(static_cast<int64_t>(steps) * of / parts); };
    return {(pair * kCluster + static_cast<int>(cluster_rank())) * kRows, column * kColumns, part, boundary(part),
            boundary(part + 1)};
  }
};

template <Of kOf>
__device__ void copy_tiles(const Problem& p, const CUtensorMap& e_map, const CUtensorMap& second_map,
                           const CUtensorMap& other_map, const CUtensorMap& weights_map, const Shared& shared) {
  constexpr int boxes = kColumns / kBox / kCluster;
  constexpr int weights_bytes = (kOf == Of::hidden ? kRows : 3 * kDepth) * static_cast<int>(sizeof(float));
  const int first_box = static_cast<int>(cluster_rank()) * boxes;
  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < p.tiles(); i += p.clusters) {
    const Problem::Tile tile = p.tile(i);
    for (int step = tile.first; step < tile.last; ++step, stage.next()) {
      Barrier* full = shared.full(stage.index);
      unsigned char* e = shared.e(stage.index);
      float* weights = shared.weights(stage.index);
      barrier_wait(shared.empty(stage.index), stage.parity ^ 1);  // in both blocks
      barrier_expect(full, kStageBytes + weights_bytes);
      int term = step * kDepth;
      if constexpr (kOf == Of::hidden) {
        const bool second = step >= p.steps_of_first;
        const int v = second ? term - p.steps_of_first * kDepth : term;
        const int block = (second ? p.second_block : p.first_block) + v / kBlockColumns;
        for (int group = 0; group < kMultipliers; ++group) {
          copy_box(e + group * kBoxBytes, second ? second_map : e_map, full, tile.row + group * kGroupRows, v);
        }
        copy_box(weights, weights_map, full, tile.row, kFactors + block);
        term = (second ? p.second : p.first) + v;
      } else {
        copy_box(e, e_map, full, term, tile.row);
        const int block = p.first_block + tile.row / kBlockColumns;
        copy_box(weights, weights_map, full, term, kFactors + block);
        copy_box(weights + kDepth, weights_map, full, term, kLabels);
        copy_box(weights + 2 * kDepth, weights_map, full, term, kOwn);
      }
      for (int box = first_box; box < first_box + boxes; ++box) {
        copy_box_to_cluster(shared.other(stage.index) + box * kBoxBytes, other_map, full, tile.column + box * kBox, term,
                            (1 << kCluster) - 1);
      }
    }
  }
}

// The threads of a group of four warps: which rows of its 64 and which of their columns one has.
struct Lane {
  int warp, lane;

  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }  // and 8 more
  __device__ __forceinline__ int pair() const { return 2 * (lane % 4); }       // of each eight columns, and one more
};

// d of this group's 64 rows and a stage's terms, for wgmma. Adds to `sums` what it is of the thread's two rows before it
// is rounded.
template <Of kOf, bool kSums>
__device__ __forceinline__ void weigh_stage(uint32_t (&d)[kDepth / 16][4], float (&sums)[2], const unsigned char* e,
                                            const float* weights, int first_row, const Lane& at) {
  const int matrix = at.lane / 8, line = at.lane % 8;
  float of_row[2];
  if constexpr (kOf == Of::hidden) of_row[0] = weights[at.row()], of_row[1] = weights[at.row() + 8];
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t packed[4];
    if constexpr (kOf == Of::hidden) {  // a row of memory is a term
      load_matrices<true>(packed, e + (16 * k + 8 * (matrix / 2) + line) * kSwizzled +
                                      ((2 * at.warp + matrix % 2) ^ line) * 16);
    } else {
      load_matrices<false>(packed, e + (16 * at.warp + 8 * (matrix % 2) + line) * kSwizzled +
                                       ((2 * k + matrix / 2) ^ line) * 16);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 factor;
      if constexpr (kOf == Of::hidden) {
        factor = {of_row[i % 2], of_row[i % 2]};
      } else {
        factor = *reinterpret_cast<const float2*>(weights + 16 * k + 8 * (i / 2) + at.pair());
      }
      const float2 of = __half22float2(bit_cast<__half2>(packed[i]));
      const float x = of.x * factor.x, y = of.y * factor.y;
      if constexpr (kSums) sums[i % 2] += x + y;
      d[k][i] = bit_cast<uint32_t>(__floats2bfloat162_rn(x, y));
    }
  }
  if constexpr (kOf == Of::weight) {
    const int* labels = reinterpret_cast<const int*>(weights + kDepth);
    const float* own = weights + 2 * kDepth;
    const int warp_row = first_row + at.warp * 16;
    const auto here = [&](int n) { return static_cast<unsigned>(labels[n] - warp_row) < 16; };
    static_assert(kDepth == 2 * 32);
    if (__any_sync(kAllLanes, here(at.lane) || here(at.lane + 32))) {  // one of these 64 rows of x has its label here
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int n = 16 * k + 8 * (i / 2) + at.pair() + j;
            if (labels[n] != first_row + at.row() + 8 * (i % 2)) continue;
            if constexpr (kSums) sums[i % 2] += own[n];
            const uint32_t rounded = bit_cast<uint32_t>(__floats2bfloat162_rn(own[n], own[n]));
            d[k][i] = j == 0 ? (d[k][i] & 0xffff0000) | (rounded & 0xffff) : (d[k][i] & 0xffff) | (rounded & 0xffff0000);
          }
        }
      }
    }
  }
}

// Writes a thread's rows, `row` and 8 more, or adds to what is there. Four threads of a row store 32 bytes together.
__device__ __forceinline__ void store(const Problem& p, float* out, const float (&acc)[kColumns / 2], int row, int column,
                                      const Lane& at) {
  constexpr int together = 8;  // loads that do not wait for one another
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= p.rows) continue;
    float* to = out + (row + 8 * r) * p.stride + column + at.pair();
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += together) {
      const auto inside = [&](int j) { return column + 8 * j < p.columns; };
      float2 x[together];
#pragma unroll
      for (int j = 0; j < together; ++j) {
        x[j] = {0, 0};
        if (p.add && inside(first + j)) x[j] = *reinterpret_cast<const float2*>(to + 8 * (first + j));
      }
#pragma unroll
      for (int j = 0; j < together; ++j) {
        const int i = 4 * (first + j) + 2 * r;
        x[j].x += acc[i], x[j].y += acc[i + 1];
        if (inside(first + j)) *reinterpret_cast<float2*>(to + 8 * (first + j)) = x[j];
      }
    }
  }
}
__device__ __forceinline__ void store(const Problem& p, __nv_bfloat16* out, const float (&acc)[kColumns / 2],
                                      int row, int column, const Lane& at) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // of two neighbours one gets four columns of the first eight, the other one of the next
    const int odd = at.lane % 2, first = column + at.pair() + 6 * odd;
    __nv_bfloat16* to = out + (row + 8 * r) * p.stride + first;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      const auto rounded = [&](int i) {
        return bit_cast<uint32_t>(__floats2bfloat162_rn(acc[4 * i + 2 * r], acc[4 * i + 2 * r + 1]));
      };
      const uint32_t mine[2] = {rounded(j), rounded(j + 1)};
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? mine[0] : mine[1], 1);
      if (row + 8 * r >= p.rows || first + 8 * j >= p.columns) continue;
      *reinterpret_cast<uint2*>(to + 8 * j) = odd ? uint2{other, mine[1]} : uint2{mine[0], other};
    }
  }
}

template <Of kOf, class O, bool kSums>
__device__ void multiply(const Problem& p, const Shared& shared) {
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1;
  const Lane at = {static_cast<int>(threadIdx.x) % kGroup / 32, static_cast<int>(threadIdx.x) % 32};
  // To both blocks, which fill it with their halves: behind the product that took what was read of it into registers, so
  // that no read is under way any more.
  const auto release = [&](int stage) {
    if (at.lane < kCluster) barrier_arrive_at(shared.empty(stage), at.lane);
  };
  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < p.tiles(); i += p.clusters) {
    const Problem::Tile tile = p.tile(i);
    const int first_row = tile.row + group * kGroupRows;
    float acc[kColumns / 2], sums[2] = {0, 0};
    uint32_t d[2][kDepth / 16][4];  // of the stage that is multiplied, and of the next
    int before = 0;
    const auto take = [&](int step, uint32_t (&now)[kDepth / 16][4]) {
      barrier_wait(shared.full(stage.index), stage.parity);
      weigh_stage<kOf, kSums>(now, sums, shared.e(stage.index) + group * kBoxBytes,
                              shared.weights(stage.index) + (kOf == Of::hidden ? group * kGroupRows : 0),
                              p.first + first_row, at);
      const uint64_t columns = descriptor(shared.other(stage.index), kBoxBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        wgmma_of_registers<kColumns>(acc, now[k], columns + k * kNextTermsOfColumns, step > tile.first || k > 0);
      }
      wgmma_commit();
      if (step > tile.first) {
        wgmma_wait<1>();
        release(before);
      }
      before = stage.index;
      stage.next();
    };
    for (int step = tile.first; step < tile.last; step += 2) {
      take(step, d[0]);
      if (step + 1 < tile.last) take(step + 1, d[1]);
    }
    wgmma_wait<0>();
    wgmma_results(acc);
    release(before);

    const int row = first_row + at.row();
    O* out = static_cast<O*>(p.out);
    if (out != nullptr) store(p, out + tile.part * p.rows * p.stride, acc, row, tile.column, at);
    if (kSums && tile.column == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = sums[r];
        for (int distance = 1; distance < 4; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (at.lane % 4 == 0 && row + 8 * r < p.rows) p.bias[row + 8 * r] = sum;
      }
    }
  }
}

// second: of dX, the rest of the exponentials.
template <Of kOf, class O, bool kSums>
__global__ void __launch_bounds__(kBlockThreads, 1)
    linear_gradient_kernel(const __grid_constant__ CUtensorMap e, const __grid_constant__ CUtensorMap second,
                           const __grid_constant__ CUtensorMap other, const __grid_constant__ CUtensorMap weights,
                           const Problem p) {
  const Shared shared{shared_memory()};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), kCluster * kMultipliers * kGroup / 32);  // by every warp that reads it
    }
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x < kGroup) {
    registers_decrease<40>();
    if (threadIdx.x == 0) copy_tiles<kOf>(p, e, second, other, weights, shared);
    __syncwarp();
  } else {
    registers_increase<232>();
    multiply<kOf, O, kSums>(p, shared);
  }
  cluster_sync();  // the other block may still write here, and arrive at barriers
}

// Blocks of factors that a thread makes of its row's shifts.
constexpr int kWeighedTogether = 8;

__global__ void __launch_bounds__(kThreads) weigh_kernel(Matrix weights, RowWeights rows, float outer_log2e) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= weights.columns) return;
  const auto at = [&](int64_t i) -> float& { return static_cast<float*>(weights.data)[i * weights.stride + row]; };
  const float weight = rows.g[row] * rows.scale[row], top = rows.top[row];
  const int64_t first = kFactors + static_cast<int64_t>(blockIdx.y) * kWeighedTogether;
#pragma unroll
  for (int i = 0; i < kWeighedTogether; ++i) {
    if (first + i >= weights.rows) break;
    const float factor = exp2f((at(first + i) - top) * outer_log2e) * weight;
    at(first + i) = factor * (1 / kPackedOne);
  }
  if (blockIdx.y != 0) return;
  const float own = weight * rows.label[row];
  at(kLabels) = __int_as_float(static_cast<int>(rows.y[row]));
  at(kOwn) = own;
  rows.own[row] = own;
}

template <Of kOf, class O, bool kSums>
void launch(Problem p, const Weighed& first, const Weighed& second, const Matrix& other, const Matrix& out,
            int processors, cudaStream_t stream) {
  constexpr auto f16 = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr int e_rows = kOf == Of::hidden ? kDepth : kRows, weights_columns = kOf == Of::hidden ? kRows : kDepth;
  p.out = out.data;
  p.stride = out.stride;
  p.row_pairs = blocks_of(p.rows, kClusterRows);
  // without a result, sums alone are wanted
  p.column_blocks = out.data == nullptr ? 1 : blocks_of(p.columns, kColumns);
  p.clusters = std::min(p.row_pairs * p.column_blocks * p.parts, std::max(1, processors / kCluster));
  p.first = static_cast<int>(first.first);
  p.first_block = first.first_block;
  p.second = static_cast<int>(second.first);
  p.second_block = second.first_block;
  const CUtensorMap e = tensor_map(f16, first.e, e_rows, kBox);
  launch_clusters(linear_gradient_kernel<kOf, O, kSums>, p.clusters, kBlockThreads, kSharedBytes, stream,
                  "launch of a gradient's product", e,
                  second.e.rows > 0 ? tensor_map(f16, second.e, e_rows, kBox) : CUtensorMap{},
                  tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, other, kDepth, kBox),
                  tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, first.weights, 1, weights_columns), p);
}

}  // namespace

void weigh(const Transform& transform, const Matrix& weights, const RowWeights& rows, cudaStream_t stream) {
  run(weigh_kernel, (weights.columns + kThreads - 1) / kThreads,
      std::max<int64_t>(1, (weights.rows - kFactors + kWeighedTogether - 1) / kWeighedTogether), stream, weights, rows,
      static_cast<float>(Scales(transform).outer * kLog2E));
}

void linear_dhidden(const Weighed& first, const Weighed& second, const Matrix& w, const Matrix& out, int parts,
                    int processors, cudaStream_t stream) {
  Problem p = {};
  p.rows = static_cast<int>(out.rows);
  p.columns = static_cast<int>(out.columns);
  p.steps_of_first = blocks_of(first.e.rows, kDepth);
  p.steps = p.steps_of_first + blocks_of(second.e.rows, kDepth);
  p.parts = parts;
  if (parts < 1 || parts > p.steps) {
    throw std::invalid_argument("parts: expected 1 to " + std::to_string(p.steps) + ", got " + std::to_string(parts));
  }
  launch<Of::hidden, float, false>(p, first, second, w, out, processors, stream);
}

void linear_dweight(const Weighed& of, const Matrix& x, DType out_type, const Matrix& out, bool add, float* bias,
                    int processors, cudaStream_t stream) {
  Problem p = {};
  p.rows = static_cast<int>(of.e.rows);
  p.columns = static_cast<int>(x.columns);
  p.steps = blocks_of(x.rows, kDepth);
  p.parts = 1;
  p.add = add;
  p.bias = bias;
  const auto with = [&](auto o) {
    using O = decltype(o);
    const auto run = bias != nullptr ? launch<Of::weight, O, true> : launch<Of::weight, O, false>;
    run(p, of, {}, x, out, processors, stream);
  };
  out_type == DType::bf16 ? with(__nv_bfloat16()) : with(float());
}

}  // namespace dpo_kernels::cuda

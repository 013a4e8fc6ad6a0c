// The product x.W^T for sm_90a alone, whose epilogue takes each tile of logits in registers and stores none: it folds
// them (path A), or stores 16-bit numbers that come of them, as [V, N]: exponentials (paths B and C) or the gradient of
// the logits (path D).
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
//
// What is stored leaves the registers through kPieces pieces of shared memory, transposed on the way, and is copied to
// its place while the next piece is computed.
#include <algorithm>

#include "clusters.cuh"
#include "exponentials.cuh"
#include "math.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kRows = kClusterRows / kCluster, kColumns = kBlockColumns, kDepth = 64, kStages = 4;
constexpr int kFolders = 2, kThreads = (1 + kFolders) * kGroup;
constexpr int kRowBytes = kDepth * 2;  // of a tile
static_assert(kRowBytes == kSwizzled);
constexpr int kXBytes = kRows * kRowBytes, kWBytes = kColumns * kRowBytes, kStageBytes = kXBytes + kWBytes;
// A warpgroup's rows of so many columns are stored at once; there are two of these, so that one can be filled while the
// other is copied.
constexpr int kPieceColumns = 64, kPieceBytes = kPieceColumns * 64 * 2, kPieces = 2;
static_assert(kColumns / kPieceColumns % kPieces == 0);
constexpr int kSharedBytes = kStages * kStageBytes + kFolders * kPieces * kPieceBytes +
                             2 * kStages * static_cast<int>(sizeof(Barrier));
static_assert(kSharedBytes <= kMostShared);
// So many pairs of blocks of rows take turns with the same columns, so that their x stays in the second-level cache.
constexpr int kRowPairsTogether = 8;
constexpr int kEntries = kColumns / 4;  // of one row that a thread has: two rows, a quarter of each

// The work items and their order, the same for all threads.
struct Schedule {
  int clusters, row_pairs, splits, split_blocks, longer_splits;
  const int* only;  // null, or [N]: pairs of blocks of rows whose first row has no 1 here are left out

  __device__ int items() const { return row_pairs * splits; }

  struct Item {
    int row_pair, split, first, last;  // blocks of columns [first, last)
  };
  __device__ Item operator[](int i) const {
    const auto [row_pair, split] = by_turns<kRowPairsTogether>(i, row_pairs, splits);
    return {row_pair, split, boundary(split), boundary(split + 1)};
  }
  __device__ bool skips(const Item& item) const {
    return only != nullptr && only[static_cast<int64_t>(item.row_pair) * kClusterRows] == 0;
  }
  // Splits differ by one block at most, and the longer ones come first.
  __device__ int boundary(int split) const { return split * split_blocks + min(split, longer_splits); }
};

using Stage = Ring<kStages>;

struct Shared {
  unsigned char* memory;

  __device__ unsigned char* x(int stage) const { return memory + stage * kStageBytes; }
  __device__ unsigned char* w(int stage) const { return x(stage) + kXBytes; }
  __device__ unsigned char* piece(int folder, int i) const {
    return memory + kStages * kStageBytes + (folder * kPieces + i) * kPieceBytes;
  }
  __device__ Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(piece(kFolders, 0)) + stage; }
  __device__ Barrier* empty(int stage) const { return full(stage) + kStages; }
};

__device__ void copy_tiles(const CUtensorMap& x_map, const CUtensorMap& w_map, const Shared& shared, Schedule schedule,
                           int depths) {
  constexpr int half = kColumns / kCluster;
  const int rank = static_cast<int>(cluster_rank());
  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < schedule.items(); i += schedule.clusters) {
    const Schedule::Item item = schedule[i];
    if (schedule.skips(item)) continue;
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

// What becomes of a tile of logits.
enum class Epilogue { fold, packed, shifted, dlogits };

struct Problem {
  const int64_t* y;
  const void* bias;  // or null
  int n, v, depths;
  int64_t first;             // y's number of the first of the v entries
  float inner, outer_log2e;  // exp(outer x) is 2^(outer_log2e x); outer > 0, inner is of either sign
  Schedule schedule;
  Parts parts;
  int first_split;
  bool stores;
  // Of exponentials, in the units of u: [blocks of columns, N] maxima that are written, or one shift a row.
  float* shift;
  int64_t shift_stride;
  int* far;
  float far_above;
  bool again;
  int all_splits;
  // Of dlogits.
  double norm_log2e;  // the unit of z, in that of outer_log2e
  const float *norm, *logp, *g;
  int64_t norm_stride;
  float slope, *missing;
};

// What a thread has seen of one row: a quarter of the columns, beside the label; but `top` is of all of them.
template <Epilogue kTo, bool kCapped, bool kStats>
struct RowFold {
  static constexpr bool kFolds = true;

  float top = -FLT_MAX, given_shift = 0;
  float sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0, part[2] = {0, 0};

  __device__ __forceinline__ float shift() const { return kTo == Epilogue::shifted ? given_shift : top; }

  __device__ __forceinline__ void begin(const Problem& p, int row) {
    if (kTo != Epilogue::shifted) return;
    given_shift = row < p.n ? p.shift[row] : 0;
    if (!p.again || row >= p.n) return;
    float most = -FLT_MAX;
    for (int split = 0; split < p.all_splits; ++split) {
      most = fmaxf(most, p.parts.data[kPartMax * p.parts.field_stride + split * p.parts.split_stride + row]);
    }
    given_shift = is_far(most, given_shift, p.far_above) ? most : given_shift;
  }

  // t: this thread's largest entry before the label in its block.
  __device__ __forceinline__ void before_label(const Problem& p, int row, float t) {
    if (kStats) p.parts.label[(kLabelBefore + threadIdx.x % 4) * p.parts.label_stride + row] = fmaxf(top, t);
  }
  __device__ __forceinline__ void label(const Problem& p, int row, int split, float u, float slope) {
    p.parts.label[kLabelLogit * p.parts.label_stride + row] = u;
    p.parts.label[kLabelDerivative * p.parts.label_stride + row] = slope;
    if (kStats) {
      if (kCapped) sum_z += u;
      p.parts.label[kLabelSplit * p.parts.label_stride + row] = __int_as_float(p.first_split + split);
    }
  }

  // What is largest in the block of columns, in each of the four threads of the row.
  __device__ __forceinline__ void raise(const Problem& p, int row, int block, float most) {
    const float next = fmaxf(top, most);
    if (kTo != Epilogue::shifted) {
      const float rescale = exp2f((top - next) * p.outer_log2e);
      if (kStats) {
        sum_ez = sum_ez * rescale + sum * rescale * fmaxf(top - next, -FLT_MAX);  // which may be far, and times 0
        sum_sq *= rescale * rescale;
      }
      sum *= rescale;
    }
    top = next;
    if (kTo == Epilogue::packed && p.stores && threadIdx.x % 4 == 0 && row < p.n) {
      p.shift[block * p.shift_stride + row] = next;
    }
  }

  // Takes an entry, -inf if it does not count, and says what is stored of it.
  __device__ __forceinline__ float entry(const Problem& p, float u, float slope, int k) {
    const float shifted = u - shift(), e = exp2f(shifted * p.outer_log2e);
    part[k] += e;
    if (kStats) {
      sum_ez += e * fmaxf(shifted, -FLT_MAX);  // 0 times -inf is to be 0
      const float small = kTo == Epilogue::shifted ? e * kSquared : e;
      sum_sq += small * small;
    }
    return kTo == Epilogue::packed ? e * slope * kPackedOne : e * slope;
  }
  __device__ __forceinline__ void end_block() {
    sum += part[0] + part[1];
    part[0] = part[1] = 0;
  }

  // Puts the four threads of the row together, and writes what they have.
  __device__ __forceinline__ void end(const Problem& p, int row, int split) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const auto other = [&](auto x) { return __shfl_xor_sync(kAllLanes, x, distance); };
      sum += other(sum);
      if (kStats) {
        sum_z += other(sum_z);
        sum_ez += other(sum_ez);
        sum_sq += other(sum_sq);
      }
    }
    if (threadIdx.x % 4 != 0 || row >= p.n) return;
    float* at = p.parts.data + (p.first_split + split) * p.parts.split_stride + row;
    const auto write = [&](PartField field, float x) { at[field * p.parts.field_stride] = x; };
    write(kPartSum, sum);
    if (kStats) {
      write(kPartSumEz, sum_ez);
      write(kPartSumSq, sum_sq);
    }
    if (kTo == Epilogue::shifted && p.again) return;
    write(kPartMax, top);
    if (kStats) write(kPartSumZ, sum_z);
    if (kTo == Epilogue::fold && p.far != nullptr) p.far[row] = 0;
    if (kTo == Epilogue::shifted && is_far(top, shift(), p.far_above)) p.far[row / kClusterRows * kClusterRows] = 1;
  }
};

// The gradient of one row's logits. Rows behind the last have none.
struct RowGradient {
  static constexpr bool kFolds = false;

  float shift_log2e = INFINITY, factor = 0, own = 0;

  __device__ __forceinline__ void begin(const Problem& p, int row) {
    if (row >= p.n) return;
    const double shift = p.norm[row] * p.norm_log2e;
    shift_log2e = static_cast<float>(shift);
    // what that rounding leaves is a power for every entry of the row
    const float rest = isinf(shift_log2e) ? 0 : static_cast<float>(shift_log2e - shift);
    factor = -p.g[row] * p.slope / p.norm[p.norm_stride + row] * exp2f(rest);
  }
  __device__ __forceinline__ void label(const Problem& p, int row, int, float, float slope) {
    own = -expm1f(p.logp[row]) * (p.g[row] * p.slope) * slope;
    p.missing[row] = own - widen(narrow<__nv_bfloat16>(own));
  }
  __device__ __forceinline__ float entry(const Problem& p, float u, float slope, int) {
    return exp2f(fmaf(u, p.outer_log2e, -shift_log2e)) * factor * slope;
  }
  __device__ __forceinline__ void end_block() {}
  __device__ __forceinline__ void end(const Problem&, int, int) {}
};

// Two 16-bit numbers of neighbouring columns.
template <Epilogue kTo>
__device__ __forceinline__ uint32_t narrow_pair(float a, float b) {
  if constexpr (kTo == Epilogue::packed) {
    return bit_cast<uint32_t>(__floats2half2_rn(a, b));
  } else {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(a, b));
  }
}

// A warpgroup's way to store its 64 rows of kPieceColumns columns through a piece of shared memory, where a column is
// 128 bytes, swizzled. Consecutive ones have different pieces.
struct Stores {
  unsigned char* piece;
  int folder;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % kGroup; }

  __device__ __forceinline__ void begin() const {
    if (thread() == 0) stores_wait<kPieces - 1>();  // what this piece had before has been read
    group_sync(1 + folder);
  }
  // This thread's pairs of columns from 8 j on, of its two rows, and from 8 (j + 1) on.
  __device__ __forceinline__ void put(int j, const uint32_t (&numbers)[4]) const {
    const int lane = thread() % 32, matrix = lane / 8, of_16_bytes = thread() / 32 * 2 + matrix % 2;
    store_transposed(piece + (8 * (j + matrix / 2) + lane % 8) * 128 + (of_16_bytes ^ lane % 8) * 16, numbers);
  }
  // row: the thread's; the first one's counts.
  __device__ __forceinline__ void end(const CUtensorMap& map, int row, int column) const {
    fence_before_stores();
    group_sync(1 + folder);
    if (thread() == 0) {
      store_box(map, piece, row, column);
      stores_commit();
    }
  }
};

template <class T, bool kCapped, bool kStats, Epilogue kTo>
__device__ void multiply_and_fold(const Problem& p, const CUtensorMap& e_map, const Shared& shared) {
  using Row = std::conditional_t<kTo == Epilogue::dlogits, RowGradient, RowFold<kTo, kCapped, kStats>>;
  constexpr bool kStores = kTo != Epilogue::fold;
  // Where nothing is to be counted: no logit, and below all. (tanh makes a number of -inf.)
  constexpr float kNothing = kCapped ? -FLT_MAX : -INFINITY;
  const int thread = static_cast<int>(threadIdx.x) % kGroup, lane = thread % 32;
  const int folder = static_cast<int>(threadIdx.x) / kGroup - 1;
  const int rank = static_cast<int>(cluster_rank());
  const T* bias = static_cast<const T*>(p.bias);
  const auto release = [&](int stage) {  // to both blocks, which fill it with their halves of W
    if (lane < kCluster) barrier_arrive_at(shared.empty(stage), lane);
  };
  const auto logit = [](float t, float& slope) {
    if (!kCapped) {
      slope = 1;
      return t;
    }
    const float u = tanh_of(t, slope);
    return t == kNothing ? -INFINITY : u;
  };

  Stage stage;
  for (int i = static_cast<int>(blockIdx.x) / kCluster; i < p.schedule.items(); i += p.schedule.clusters) {
    const Schedule::Item item = p.schedule[i];
    if (kTo == Epilogue::shifted && p.schedule.skips(item)) continue;
    const int thread_now = thread_read_anew() - kGroup;  // kept, its place in the block would be a register too many
    const int row = (item.row_pair * kCluster + rank) * kRows + thread_now / 32 * 16 + thread_now % 32 / 4;
    Row rows[2];  // `row` and row + 8
    int label[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t y = row + 8 * r < p.n ? p.y[row + 8 * r] - p.first : -1;
      label[r] = y >= 0 && y < p.v ? static_cast<int>(y) : -1;
      rows[r].begin(p, row + 8 * r);
    }

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
        if (bias != nullptr) {
          const int column = first + 8 * (j / 4) + j % 2;
          if (column < p.v) acc[j] += widen(bias[column]);
        }
        if (kCapped || p.inner != 1) acc[j] *= p.inner;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto t = [&](int k) -> float& { return acc[4 * (k / 2) + 2 * r + k % 2]; };
        const auto column = [&](int k) { return first + 8 * (k / 2) + k % 2; };
        constexpr bool kSumsHere = kStats && !kCapped;
        if ((block + 1) * kColumns > p.v) {  // the last block; its columns beyond V count for nothing
#pragma unroll
          for (int k = 0; k < kEntries; ++k) {
            const bool inside = column(k) < p.v;
            if constexpr (kSumsHere) rows[r].sum_z += inside ? t(k) : 0;
            t(k) = inside ? t(k) : kNothing;
          }
        } else if constexpr (kSumsHere) {
#pragma unroll
          for (int k = 0; k < kEntries; ++k) rows[r].sum_z += t(k);
        }
        if (label[r] >= block * kColumns && label[r] < (block + 1) * kColumns) {
          float own = 0, earlier = kNothing, slope;
#pragma unroll
          for (int k = 0; k < kEntries; ++k) {
            if (kStats) earlier = column(k) < label[r] ? fmaxf(earlier, t(k)) : earlier;
            own = column(k) == label[r] ? t(k) : own;
            t(k) = column(k) == label[r] ? kNothing : t(k);
          }
          if constexpr (kStats) rows[r].before_label(p, row + 8 * r, logit(earlier, slope));
          if (label[r] % 8 / 2 == lane % 4) {
            const float u = logit(own, slope);
            rows[r].label(p, row + 8 * r, item.split, u, slope);
          }
        }
        if constexpr (Row::kFolds) {
          float most[4] = {t(0), t(1), t(2), t(3)};  // each in turn, so that none waits for the one before
#pragma unroll
          for (int k = 4; k < kEntries; ++k) most[k % 4] = fmaxf(most[k % 4], t(k));
          float top = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])), slope;
#pragma unroll
          for (int distance = 1; distance < 4; distance *= 2) {
            top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
          }
          // Of nothing tanh makes -1, which no entry with a softcap is below, -inf least of all.
          rows[r].raise(p, row + 8 * r, block, kCapped ? tanh_of(top, slope) : top);
        }
      }
#pragma unroll
      for (int piece = 0; piece < kColumns / kPieceColumns; ++piece) {
        const int first_column = block * kColumns + piece * kPieceColumns;
        const bool stored = kStores && p.stores;
        const Stores stores{shared.piece(folder, piece % kPieces), folder};
        if (stored) stores.begin();
#pragma unroll
        for (int j = 0; j < kPieceColumns / 8; j += 2) {
          uint32_t numbers[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i % 2, group = piece * kPieceColumns / 8 + j + i / 2;
            float written[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const int column = first + 8 * group + k;
              float slope;
              const float u = logit(acc[4 * group + 2 * r + k], slope);
              if constexpr (kStats && kCapped) rows[r].sum_z += u == -INFINITY ? 0 : u;
              written[k] = rows[r].entry(p, u, slope, k);
              if constexpr (!Row::kFolds) written[k] = column == label[r] ? rows[r].own : written[k];
            }
            numbers[i] = narrow_pair<kTo>(written[0], written[1]);
          }
          if (stored) stores.put(j, numbers);
        }
        if (stored) stores.end(e_map, row, first_column);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) rows[r].end_block();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r].end(p, row + 8 * r, item.split);
  }
  if (kStores && thread == 0) stores_wait<0>();
}

template <class T, bool kCapped, bool kStats, Epilogue kTo>
__global__ void __launch_bounds__(kThreads, 1)
    linear_fold_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                       const __grid_constant__ CUtensorMap e_map, const Problem p) {
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
    multiply_and_fold<T, kCapped, kStats, kTo>(p, e_map, shared);
  }
  cluster_sync();  // the other block may still write here, and arrive at barriers
}

// What all epilogues have in common.
Problem problem(const LinearProduct& args, int processors) {
  const Scales scales(args.transform);
  Problem p = {};
  p.y = args.y;
  p.bias = args.bias;
  p.n = static_cast<int>(args.x.rows);
  p.v = static_cast<int>(args.w.rows);
  p.depths = blocks_of(args.x.columns, kDepth);
  p.first = args.first;
  p.inner = static_cast<float>(scales.inner);
  p.outer_log2e = static_cast<float>(scales.outer * kLog2E);
  const int row_pairs = blocks_of(args.x.rows, kClusterRows);
  const int clusters = std::min(row_pairs * args.splits, std::max(1, processors / kCluster));
  const int column_blocks = blocks_of(args.w.rows, kColumns);
  p.schedule = {clusters, row_pairs, args.splits, column_blocks / args.splits, column_blocks % args.splits, nullptr};
  return p;
}

template <class T, bool kCapped, bool kStats, Epilogue kTo>
void launch(DType type, const LinearProduct& args, const Matrix& e, const Problem& p, cudaStream_t stream) {
  const auto of_operands = type == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMap x = tensor_map(of_operands, args.x, kRows, kDepth);
  const CUtensorMap w = tensor_map(of_operands, args.w, kColumns / kCluster, kDepth);
  const CUtensorMap stored =
      p.stores ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, e, kPieceColumns, 64) : CUtensorMap{};
  launch_clusters(linear_fold_kernel<T, kCapped, kStats, kTo>, p.schedule.clusters, kThreads, kSharedBytes, stream,
                  "launch of the fused product", x, w, stored, p);
}

template <class T, Epilogue kTo>
void launch_fold(DType type, const LinearProduct& args, const Matrix& e, const Problem& p, bool stats,
                 cudaStream_t stream) {
  const bool capped = args.transform.softcap != 0;
  const auto run = capped ? (stats ? launch<T, true, true, kTo> : launch<T, true, false, kTo>)
                          : (stats ? launch<T, false, true, kTo> : launch<T, false, false, kTo>);
  run(type, args, e, p, stream);
}

}  // namespace

void linear_fold(DType type, const LinearProduct& args, const Parts& parts, bool stats, int* far, int processors,
                 cudaStream_t stream) {
  Problem p = problem(args, processors);
  p.parts = parts;
  p.far = far;
  type == DType::bf16 ? launch_fold<__nv_bfloat16, Epilogue::fold>(type, args, {}, p, stats, stream)
                      : launch_fold<__half, Epilogue::fold>(type, args, {}, p, stats, stream);
}

void linear_exp(const LinearProduct& args, const Parts& parts, int first_split, const Exponentials& out, bool stats,
                int processors, cudaStream_t stream) {
  Problem p = problem(args, processors);
  p.parts = parts;
  p.first_split = first_split;
  p.stores = out.e.data != nullptr;
  p.shift = out.shift;
  p.shift_stride = out.shift_stride;
  p.far = out.far;
  p.far_above = static_cast<float>(out.far_above / Scales(args.transform).outer);
  p.again = out.again;
  p.all_splits = out.splits;
  if (out.again) p.schedule.only = out.far;
  const auto run =
      out.packed ? launch_fold<__nv_bfloat16, Epilogue::packed> : launch_fold<__nv_bfloat16, Epilogue::shifted>;
  run(DType::bf16, args, out.e, p, stats, stream);
}

void linear_dlogits(const LinearProduct& args, const Matrix& out, const GradRows& grad, float* missing, int processors,
                    cudaStream_t stream) {
  Problem p = problem(args, processors);
  p.stores = true;
  p.norm_log2e = p.outer_log2e / Scales(args.transform).outer;
  p.norm = static_cast<const float*>(grad.norm);
  p.norm_stride = grad.norm_stride;
  p.logp = static_cast<const float*>(grad.logp);
  p.g = static_cast<const float*>(grad.g);
  p.slope = static_cast<float>(args.transform.slope());
  p.missing = missing;
  const auto run = args.transform.softcap != 0 ? launch<__nv_bfloat16, true, false, Epilogue::dlogits>
                                               : launch<__nv_bfloat16, false, false, Epilogue::dlogits>;
  run(DType::bf16, args, out, p, stream);
}

}  // namespace dpo_kernels::cuda

// The functions of csrc/cuda/hopper.cuh, which the guard below makes empty, and the tensor maps of the driver.
//
// A copy arrives at once, later, or when nothing else can happen; a wgmma, and a copy out of shared memory, reads its
// operands when it is issued or when it is waited for, and accumulators are NaN in between. DPO_EMULATION_SEED decides:
// see fibers.h.
#pragma once
#define DPO_KERNELS_HOPPER_CUH

#include <algorithm>

#include "emulation.h"

// The driver.

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 7,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B,
};
enum CUtensorMapL2promotion {
  CU_TENSOR_MAP_L2_PROMOTION_NONE,
  CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct alignas(128) CUtensorMap {
  cuuint64_t opaque[16];
};

namespace emulation {

// What a tensor map says; the magic number tells an encoded one.
constexpr uint64_t kEncoded = 0x70616d20726f736e;
struct Map {
  uint64_t magic;
  const unsigned char* data;
  int64_t columns, rows, stride;  // of the tensor; stride in bytes
  int64_t box_columns, box_rows, size;
  bool swizzled;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

}  // namespace emulation

// As strict as the driver, and stricter: rank 2, swizzled boxes of 128 bytes, or unswizzled ones.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                       const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (map == nullptr || rank != 2 || data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(map) % 64 != 0 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      (!swizzled && swizzle != CU_TENSOR_MAP_SWIZZLE_NONE) || promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const uint64_t size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, inner = box[0] * size;
  for (int i = 0; i < 2; ++i) {
    if (dims[i] == 0 || dims[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  if (strides[0] % 16 != 0 || strides[0] >= uint64_t{1} << 40 || strides[0] < dims[0] * size || inner % 16 != 0 ||
      (swizzled && inner != 128)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const emulation::Map encoded = {emulation::kEncoded,
                                  static_cast<const unsigned char*>(data),
                                  static_cast<int64_t>(dims[0]),
                                  static_cast<int64_t>(dims[1]),
                                  static_cast<int64_t>(strides[0]),
                                  static_cast<int64_t>(box[0]),
                                  static_cast<int64_t>(box[1]),
                                  static_cast<int64_t>(size),
                                  swizzled};
  memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}
typedef decltype(&cuTensorMapEncodeTiled) PFN_cuTensorMapEncodeTiled_v12000;

constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status = nullptr) {
  const bool found = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  if (status != nullptr) *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return found ? cudaSuccess : emulation::remember(cudaErrorSymbolNotFound);
}

namespace dpo_kernels {

struct Barrier {
  uint64_t state;
};

inline unsigned char* shared_memory() { return emulation::state.current->block->shared; }
inline uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - shared_memory();
  emulation::expect(offset >= 0 && static_cast<size_t>(offset) < emulation::state.shared_bytes,
                    "an address outside of the block's dynamic shared memory");
  return emulation::kSharedBase + static_cast<uint32_t>(offset);
}

}  // namespace dpo_kernels

namespace emulation {

// An mbarrier. Its phase is complete once no arrivals and no bytes are missing.
struct Phase {
  uint64_t parity : 1, valid : 2, expected : 20, missing : 20;
  int64_t bytes : 21;
};
static_assert(sizeof(Phase) == sizeof(dpo_kernels::Barrier));
constexpr unsigned kValid = 2;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // of a phase, as in the PTX ISA

// The barrier at that offset of a block's shared memory.
inline Phase phase_at(const Block& block, size_t offset) {
  Phase phase;
  expect(offset % 8 == 0 && offset + 8 <= state.shared_bytes, "a barrier must be aligned, in dynamic shared memory");
  memcpy(&phase, block.shared + offset, sizeof phase);
  expect(phase.valid == kValid, "a barrier was used before it was initialized");
  return phase;
}
inline void update(const Block& block, size_t offset, int arrivals, int64_t bytes) {
  Phase phase = phase_at(block, offset);
  expect(block.running > 0, "an arrival at a barrier of a block that has ended");
  expect(static_cast<uint64_t>(arrivals) <= phase.missing, "more arrivals at a barrier than it expects");
  expect(std::abs(phase.bytes + bytes) <= kMostBytes, "more bytes at a barrier than it can count");
  phase.missing -= static_cast<unsigned>(arrivals);
  phase.bytes += bytes;
  if (phase.missing == 0 && phase.bytes == 0) {
    phase.parity ^= 1;
    phase.missing = phase.expected;
  }
  memcpy(block.shared + offset, &phase, sizeof phase);
}
inline size_t offset_of(const void* p) { return dpo_kernels::shared_address(p) - kSharedBase; }

// Where a byte lies that belongs at this address without swizzling.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline void fill_box(const Block& block, size_t offset, const Map& map, int64_t column, int64_t row) {
  const int64_t inner = map.box_columns * map.size;
  const int64_t first = std::max<int64_t>(0, -column), last = std::min(map.box_columns, map.columns - column);
  for (int64_t r = 0; r < map.box_rows; ++r) {
    unsigned char bytes[256 * 4] = {};  // zero outside of the tensor
    if (row + r >= 0 && row + r < map.rows && first < last) {
      memcpy(bytes + first * map.size, map.data + (row + r) * map.stride + (column + first) * map.size,
             static_cast<size_t>((last - first) * map.size));
    }
    for (int64_t chunk = 0; chunk < inner; chunk += 16) {
      const uint32_t address = kSharedBase + static_cast<uint32_t>(static_cast<int64_t>(offset) + r * inner + chunk);
      memcpy(block.shared + (map.swizzled ? swizzle(address) : address) - kSharedBase, bytes + chunk, 16);
    }
  }
}
inline void copy(void* to, const CUtensorMap& encoded, dpo_kernels::Barrier* barrier, int column, int row,
                 uint32_t ranks) {
  Map map;
  memcpy(&map, &encoded, sizeof map);
  expect(map.magic == kEncoded, "a copy by a tensor map that was not encoded");
  const size_t offset = offset_of(to), barrier_offset = offset_of(barrier);
  const int64_t bytes = map.box_rows * map.box_columns * map.size;
  expect(offset % (map.swizzled ? 1024 : 128) == 0, "a copy to an address that is not aligned");
  expect(offset + static_cast<size_t>(bytes) <= state.shared_bytes, "a copy past the end of shared memory");
  expect(ranks != 0 && ranks >> state.blocks.size() == 0, "a copy to no block, or to one that the cluster lacks");
  for (uint32_t rank = 0; rank < state.blocks.size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    auto arrive = [=, &block = state.blocks[rank]] {
      expect(block.running > 0, "a copy to a block that has ended");
      fill_box(block, offset, map, column, row);
      update(block, barrier_offset, 0, -bytes);
    };
    const uint64_t time = state.seed != 0 ? random() % 3 : 1;
    if (time == 0) {
      arrive();
    } else {
      state.copies.push_back({arrive, time == 1});
    }
  }
  maybe_interrupt();
}

// What lies outside of the tensor is not written.
inline void write_box(const Block& block, size_t offset, const Map& map, int64_t column, int64_t row) {
  const int64_t inner = map.box_columns * map.size;
  for (int64_t r = std::max<int64_t>(0, -row); r < map.box_rows && row + r < map.rows; ++r) {
    for (int64_t at = 0; at < inner; at += map.size) {
      const int64_t to = column + at / map.size;
      if (to < 0 || to >= map.columns) continue;
      const uint32_t address = kSharedBase + static_cast<uint32_t>(static_cast<int64_t>(offset) + r * inner + at);
      memcpy(const_cast<unsigned char*>(map.data) + (row + r) * map.stride + to * map.size,
             block.shared + (map.swizzled ? swizzle(address) : address) - kSharedBase, static_cast<size_t>(map.size));
    }
  }
}

// Number types of operands.
inline const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> of(65536);
    for (unsigned i = 0; i < of.size(); ++i) of[i] = __half2float({static_cast<uint16_t>(i)});
    return of;
  }();
  return values.data();
}
inline float value_of(__nv_bfloat16 x, const float*) { return __bfloat162float(x); }
inline float value_of(__half x, const float* halves) { return halves[x.bits]; }

// An operand of a wgmma that a descriptor names, swizzled by 128 bytes.
struct Operand {
  const unsigned char* shared;
  uint32_t start, leading, stride;  // in bytes; the stride is between groups of eight rows of memory

  explicit Operand(uint64_t descriptor)
      : shared(dpo_kernels::shared_memory()),
        start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    expect(descriptor >> 62 == 1, "wgmma: only operands swizzled by 128 bytes are emulated");
    expect((descriptor >> 49 & 7) == 0, "wgmma: a base offset is not emulated");
  }
  const unsigned char* at(uint32_t address, uint32_t bytes) const {
    const uint32_t place = swizzle(address);
    expect(place >= kSharedBase && place + bytes <= kSharedBase + state.shared_bytes,
           "wgmma: an operand outside of shared memory");
    return shared + (place - kSharedBase);
  }
  // K-major: a row of memory is one of the operand, of which this is 16 numbers. There is no leading dimension.
  template <class T>
  void row(int r, float (&to)[16]) const {
    const float* halves = std::is_same<T, __half>::value ? half_values() : nullptr;
    const uint32_t address = start + static_cast<uint32_t>(r / 8) * stride + static_cast<uint32_t>(r % 8) * 128;
    for (uint32_t chunk = 0; chunk < 2; ++chunk) {
      T numbers[8];
      memcpy(numbers, at(address + 16 * chunk, 16), sizeof numbers);
      for (uint32_t k = 0; k < 8; ++k) to[8 * chunk + k] = value_of(numbers[k], halves);
    }
  }
  // MN-major: a row of memory is term k of 64 columns; `leading` bytes further it is of the next 64. This is term k of
  // columns c, which is even, and c + 1.
  template <class T>
  void pair(int k, int c, float (&to)[2]) const {
    T numbers[2];
    memcpy(numbers,
           at(start + static_cast<uint32_t>(c / 64) * leading + static_cast<uint32_t>(k / 8) * stride +
                  static_cast<uint32_t>(k % 8) * 128 + static_cast<uint32_t>(c % 64) * 2,
              4),
           sizeof numbers);
    for (int i = 0; i < 2; ++i) to[i] = value_of(numbers[i], std::is_same<T, __half>::value ? half_values() : nullptr);
  }
};

// This thread's part of sums [64, N] (+)= a [64, 16] b: its two rows of a, and its quarter of b's columns.
template <int N>
void add_products(float* sums, const float (&rows)[2][16], const float (&columns)[16][N / 4], bool accumulate) {
  float products[2][N / 4] = {};
  for (int k = 0; k < 16; ++k) {
    for (int h = 0; h < 2; ++h) {
      for (int c = 0; c < N / 4; ++c) products[h][c] += rows[h][k] * columns[k][c];
    }
  }
  for (int i = 0; i < N / 2; ++i) sums[i] = (accumulate ? sums[i] : 0) + products[i / 2 % 2][2 * (i / 4) + i % 2];
}

// b is [N, 16]^T, and both are rows of terms.
template <class T, int N>
void multiply(float* sums, uint64_t a, const float (&)[2][16], uint64_t b, bool accumulate) {
  const Operand left(a), right(b);
  const int t = static_cast<int>(state.current->index % 128);
  float rows[2][16], columns[16][N / 4], column[16];
  for (int h = 0; h < 2; ++h) left.row<T>(16 * (t / 32) + t % 32 / 4 + 8 * h, rows[h]);
  for (int c = 0; c < N / 4; ++c) {
    right.row<T>(8 * (c / 2) + 2 * (t % 4) + c % 2, column);
    for (int k = 0; k < 16; ++k) columns[k][c] = column[k];
  }
  add_products<N>(sums, rows, columns, accumulate);
}
// a came in registers; b is [16, N], terms.
template <class T, int N>
void multiply_registers(float* sums, uint64_t, const float (&rows)[2][16], uint64_t b, bool accumulate) {
  const Operand right(b);
  const int t = static_cast<int>(state.current->index % 128);
  float columns[16][N / 4], two[2];
  for (int k = 0; k < 16; ++k) {
    for (int c = 0; c < N / 4; c += 2) {
      right.pair<T>(k, 8 * (c / 2) + 2 * (t % 4), two);
      columns[k][c] = two[0], columns[k][c + 1] = two[1];
    }
  }
  add_products<N>(sums, rows, columns, accumulate);
}

inline constexpr uint32_t kUnderWay = 0x7fc0dead;  // NaN

inline std::vector<float>& sums_of(Fiber& f, const float* acc) {
  for (Accumulator& a : f.accumulators) {
    if (a.acc == acc) return a.sums;
  }
  throw std::logic_error("emulation: a wgmma without its sums");
}
inline void compute(Fiber& f, Product& p) {
  p.compute(sums_of(f, p.acc).data(), p.a, p.rows, p.b, p.accumulate);
  p.computed = true;
}
// Ends the products of all groups but the last `pending`.
inline void finish(Fiber& f, int pending) {
  auto product = f.products.begin();
  for (; product != f.products.end() && product->group < f.groups - pending; ++product) {
    if (!product->computed) compute(f, *product);
    expect(product->registers == nullptr || memcmp(product->registers, product->issued, sizeof product->issued) == 0,
           "registers of an operand were written while a wgmma was under way");
  }
  f.products.erase(f.products.begin(), product);
  for (auto a = f.accumulators.begin(); a != f.accumulators.end();) {
    bool under_way = false;
    for (const Product& p : f.products) under_way |= p.acc == a->acc;
    if (under_way) {
      ++a;
      continue;
    }
    for (size_t i = 0; i < a->sums.size(); ++i) {
      expect(__float_as_uint(a->acc[i]) == kUnderWay, "accumulators were written while a wgmma was under way");
      a->acc[i] = a->sums[i];
    }
    a = f.accumulators.erase(a);
  }
}

}  // namespace emulation

namespace dpo_kernels {

inline int thread_read_anew() { return static_cast<int>(threadIdx.x); }
inline uint32_t cluster_rank() { return emulation::state.current->block->rank; }
inline void cluster_sync() { emulation::meet(emulation::state.cluster, emulation::state.running, "cluster_sync"); }

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
  emulation::expect(emulation::offset_of(barrier) % 8 == 0, "a barrier must be aligned");
  emulation::expect(arrivals > 0 && arrivals < 1 << 20, "a barrier must expect 1 to 2^20 - 1 arrivals");
  const emulation::Phase phase = {0, emulation::kValid, arrivals, arrivals, 0};
  memcpy(barrier, &phase, sizeof phase);
}
inline void fence_barrier_init() {}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulation::update(*emulation::state.current->block, emulation::offset_of(barrier), 0, bytes);
  emulation::update(*emulation::state.current->block, emulation::offset_of(barrier), 1, 0);
  emulation::maybe_interrupt();
}
inline void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
  emulation::expect(rank < emulation::state.blocks.size(), "an arrival at a block that the cluster lacks");
  emulation::update(emulation::state.blocks[rank], emulation::offset_of(barrier), 1, 0);
  emulation::maybe_interrupt();
}
inline void barrier_arrive(Barrier* barrier) { barrier_arrive_at(barrier, cluster_rank()); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulation::phase_at(*emulation::state.current->block, emulation::offset_of(barrier));
  emulation::expect(parity <= 1, "a parity is 0 or 1");
  emulation::wait_while(barrier, 1, parity, "barrier");
}

inline void copy_box(void* to, const CUtensorMap& map, Barrier* barrier, int column, int row) {
  emulation::copy(to, map, barrier, column, row, 1u << cluster_rank());
}
inline void copy_box_to_cluster(void* to, const CUtensorMap& map, Barrier* barrier, int column, int row,
                                uint16_t blocks) {
  emulation::copy(to, map, barrier, column, row, blocks);
}

inline void store_box(const CUtensorMap& encoded, const void* from, int column, int row) {
  emulation::Map map;
  memcpy(&map, &encoded, sizeof map);
  emulation::expect(map.magic == emulation::kEncoded, "a copy by a tensor map that was not encoded");
  emulation::Fiber& f = *emulation::state.current;
  const size_t offset = emulation::offset_of(from);
  const auto bytes = static_cast<size_t>(map.box_rows * map.box_columns * map.size);
  emulation::expect(offset % (map.swizzled ? 1024 : 128) == 0, "a copy from an address that is not aligned");
  emulation::expect(offset + bytes <= emulation::state.shared_bytes, "a copy past the end of shared memory");
  for (const emulation::Fiber& other : emulation::state.fibers) {
    const bool of_group = !other.done && other.block == f.block && other.index / 128 == f.index / 128;
    emulation::expect(!of_group || !other.wrote_unfenced, "a copy of what was written without fence_before_stores");
  }
  std::function<void()> read = [=, &block = *f.block] { emulation::write_box(block, offset, map, column, row); };
  if (emulation::state.seed != 0 && emulation::random() % 2 == 0) {
    read();
    read = nullptr;
  }
  f.stores.push_back({read, f.store_groups});
  emulation::maybe_interrupt();
}
inline void stores_commit() { ++emulation::state.current->store_groups; }
template <int PENDING>
void stores_wait() {
  emulation::Fiber& f = *emulation::state.current;
  auto store = f.stores.begin();
  for (; store != f.stores.end() && store->group < f.store_groups - PENDING; ++store) {
    if (store->read) store->read();
  }
  f.stores.erase(f.stores.begin(), store);
  emulation::maybe_interrupt();
}
inline void fence_before_stores() { emulation::state.current->wrote_unfenced = false; }

inline void store_transposed(void* column, const uint32_t (&matrices)[4]) {
  emulation::Fiber& f = *emulation::state.current;
  const unsigned lane = f.index % warpSize, own = lane / 8, i = lane % 8;
  emulation::expect(emulation::offset_of(column) % 16 == 0, "stmatrix to an address that is not aligned");
  uint16_t numbers[8];
  for (unsigned m = 0; m < 4; ++m) {
    const uint64_t* of_lanes = emulation::exchange(~0u, matrices[m], "store_transposed");
    for (unsigned row = 0; row < 8 && m == own; ++row) {
      numbers[row] = static_cast<uint16_t>(of_lanes[4 * row + i / 2] >> 16 * (i % 2));
    }
  }
  memcpy(column, numbers, sizeof numbers);
  f.wrote_unfenced = true;
}

inline void group_sync(int group) {
  emulation::Fiber& f = *emulation::state.current;
  emulation::expect(group > 0 && group < 16, "a group's number is 1 to 15");
  emulation::meet(f.block->groups[f.index / 128], 128, "group_sync");
}

// The row of 16 bytes that each lane names, to the threads that have it in registers.
template <bool TRANSPOSED>
void load_matrices(uint32_t (&matrices)[4], const void* row) {
  emulation::expect(emulation::offset_of(row) % 16 == 0, "ldmatrix of an address that is not aligned");
  emulation::expect(emulation::offset_of(row) + 16 <= emulation::state.shared_bytes, "ldmatrix past the end");
  const unsigned lane = emulation::state.current->index % warpSize;
  const uint64_t* rows = emulation::exchange(~0u, reinterpret_cast<uintptr_t>(row), "load_matrices");
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t numbers[2];
    for (unsigned i = 0; i < 2; ++i) {
      unsigned r = lane / 4, column = 2 * (lane % 4) + i;
      if (TRANSPOSED) std::swap(r, column);
      numbers[i] = reinterpret_cast<const uint16_t*>(rows[8 * m + r])[column];
    }
    memcpy(&matrices[m], numbers, sizeof numbers);
  }
}

}  // namespace dpo_kernels

namespace emulation {

// Issues a product whose left operand is named by `product.a`, or was in registers.
inline void issue(Fiber& f, const Product& product, int count) {
  expect(f.fenced, "wgmma without a wgmma_fence since the last wait for all");
  bool under_way = false, waits = false;
  for (const Product& p : f.products) {
    under_way |= p.acc == product.acc;
    waits |= !p.computed;
  }
  if (!under_way) {
    f.accumulators.push_back({product.acc, std::vector<float>(product.acc, product.acc + count)});
    for (int i = 0; i < count; ++i) product.acc[i] = __uint_as_float(kUnderWay);
  }
  f.products.push_back(product);
  // Products end in order.
  if (!waits && state.seed != 0 && random() % 2 == 0) compute(f, f.products.back());
}

}  // namespace emulation

namespace dpo_kernels {

template <class T, int N>
void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "wgmma: bf16 or fp16");
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma: N must be a multiple of 8 up to 256");
  emulation::Fiber& f = *emulation::state.current;
  emulation::issue(f, {emulation::multiply<T, N>, acc, a, b, accumulate, false, f.groups}, N / 2);
}
template <int N>
void wgmma_of_registers(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N % 64 == 0 && N <= 256, "wgmma: the emulated operands have whole rows of 64 columns");
  emulation::Fiber& f = *emulation::state.current;
  emulation::Product product = {emulation::multiply_registers<__nv_bfloat16, N>, acc, 0, b, accumulate, false, f.groups};
  product.registers = a;
  memcpy(product.issued, a, sizeof product.issued);
  // Four threads have a row; none of them writes its registers before all have met again.
  const uint64_t* lanes = emulation::exchange(~0u, reinterpret_cast<uintptr_t>(a), "wgmma_of_registers");
  for (unsigned other = 0, first = f.index % warpSize / 4 * 4; other < 4; ++other) {
    const auto* of = reinterpret_cast<const uint32_t*>(lanes[first + other]);
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned k = 0; k < 2; ++k) {
        const __nv_bfloat16 number = {static_cast<uint16_t>(of[i] >> 16 * k)};
        product.rows[i % 2][8 * (i / 2) + 2 * other + k] = __bfloat162float(number);
      }
    }
  }
  emulation::issue(f, product, N / 2);
}
inline void wgmma_fence() { emulation::state.current->fenced = true; }
inline void wgmma_commit() { ++emulation::state.current->groups; }
// The four warps leave together: a wgmma is one operation of all of them.
template <int COUNT>
void wgmma_results(float (&)[COUNT]) {}
template <int PENDING>
void wgmma_wait() {
  emulation::Fiber& f = *emulation::state.current;
  emulation::finish(f, PENDING);
  if (PENDING == 0) f.fenced = false;
  emulation::meet(f.block->groups[f.index / 128], 128, "wgmma_wait");
  emulation::maybe_interrupt();
}
template <int N>
void registers_increase() {}
template <int N>
void registers_decrease() {}

}  // namespace dpo_kernels

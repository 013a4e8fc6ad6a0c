// Hopper's instructions behind functions: barriers in shared memory, copies by the tensor memory accelerator, and
// products by a group of four warps. Nothing here knows what is computed.
//
// Sources: PTX ISA 8.0 and later, sections "mbarrier", "cp.async.bulk.tensor", "ldmatrix", "wgmma" (with "Shared Memory
// Matrix Layout", "Strides" and "Matrix Descriptor Format") and "setmaxnreg".
#ifndef DPO_KERNELS_HOPPER_CUH
#define DPO_KERNELS_HOPPER_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dpo_kernels {

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// threadIdx.x, where it is not to be kept in a register.
__device__ __forceinline__ int thread_read_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Waits for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A phase of a barrier is complete when `arrivals` have come and all bytes that were announced.
struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes barriers known to the copying hardware, and to other blocks once the cluster has synchronized.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// One arrival, at the same barrier of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Returns once the phase of this parity is complete; the phase before a new barrier's first has parity 1.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies the box of `map` that begins at (row, column) to shared memory and tells the barrier; one thread calls it.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same to the same place, and barrier, of all blocks of the cluster whose bits are set.
__device__ __forceinline__ void copy_box_to_cluster(void* to, const CUtensorMap& map, Barrier* barrier, int column,
                                                    int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "h"(blocks), "r"(column), "r"(row)
      : "memory");
}

// Copies shared memory to the box of `map` that begins at (row, column), as far as that lies inside of the matrix; one
// thread calls it. Those of a thread that are committed together are waited for together.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(&map)),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns once shared memory has been read by all but kPending of the groups that this thread has committed.
template <int kPending>
__device__ __forceinline__ void stores_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// What this thread has written to shared memory is seen by the copies that are issued once the threads have met.
__device__ __forceinline__ void fence_before_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four matrices [8, 8] of 16-bit numbers, in which thread t of a warp has row t / 4, columns 2 (t % 4) and one more, in
// registers: their columns go to 16 bytes each. Thread t says where that of matrix t / 8, column t % 8, is.
__device__ __forceinline__ void store_transposed(void* column, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(column)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// The other way: four matrices [8, 8] of 16-bit numbers, whose rows are 16 bytes each, to where the above has them. Thread
// t says where that of matrix t / 8, row t % 8, is. Of `transposed` ones these are columns.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// Waits for the four warps of a group; each group of the block has a number, above 0.
__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
}

// Between what threads do with registers and what wgmma does with them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns once at most kPending of the committed groups are still at work.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading what wgmma writes before it is there.
template <int kCount>
__device__ __forceinline__ void wgmma_results(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// acc [64, kN] (+)= a [64, 16] b [kN, 16]^T for T bf16 or fp16; both lie in shared memory, rows of terms that are
// named by descriptors. Thread t of the 128 holds in acc[i] the entry
//   row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
#define DPO_ACC8(acc, i)                                                                                  \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define DPO_ACC32(acc, i) DPO_ACC8(acc, i), DPO_ACC8(acc, i + 8), DPO_ACC8(acc, i + 16), DPO_ACC8(acc, i + 24)
#define DPO_WGMMA_N256(type, accumulate, operands, ...)                                                   \
  asm volatile(                                                                                           \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " accumulate                                                  \
      ", 0;\n"                                                                                            \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
      " "                                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      operands ";\n}"                                                                                     \
      : DPO_ACC32(acc, 0), DPO_ACC32(acc, 32), DPO_ACC32(acc, 64), DPO_ACC32(acc, 96)                     \
      : __VA_ARGS__)

template <class T, int kN>
__device__ __forceinline__ void wgmma(float (&acc)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 256, "wgmma: written out for 256 columns");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    DPO_WGMMA_N256("bf16", "%130", "%128, %129, add, 1, 1, 0, 0", "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    DPO_WGMMA_N256("f16", "%130", "%128, %129, add, 1, 1, 0, 0", "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}

// acc [64, kN] (+)= a [64, 16] b [16, kN] in bf16; b is named by a descriptor, of rows that have one term each. a is in
// registers, which are not to be written before this is waited for: thread t holds in a[i] the entries
//   row 16 (t / 32) + t % 32 / 4 + 8 (i % 2), columns 8 (i / 2) + 2 (t % 4) and one more.
template <int kN>
__device__ __forceinline__ void wgmma_of_registers(float (&acc)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  static_assert(kN == 256, "wgmma: written out for 256 columns");
  DPO_WGMMA_N256("bf16", "%133", "{%128, %129, %130, %131}, %132, add, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                 "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef DPO_WGMMA_N256
#undef DPO_ACC32
#undef DPO_ACC8

// How many registers each thread of this group of four warps has from here on.
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace dpo_kernels

#endif

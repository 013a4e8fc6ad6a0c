// What the kernels use of CUDA, for a C++ compiler and one thread of the CPU: fibers.h runs the threads, hopper.h has
// Hopper's instructions. Device memory is the host's. Not emulated: the errors of functions such as exp2f and __expf,
// which are the host's here, and caches and store buffers, so that a missing fence does not show.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // blocks run one after another; in a cluster they would share it
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// Vectors.

#define EMULATION_VECTORS(T, name, align2, align4)           \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTORS(unsigned char, uchar, 2, 4)
EMULATION_VECTORS(short, short, 4, 8)
EMULATION_VECTORS(unsigned short, ushort, 4, 8)
EMULATION_VECTORS(int, int, 8, 16)
EMULATION_VECTORS(unsigned, uint, 8, 16)
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(double, double, 16, 16)
EMULATION_VECTORS(long long, longlong, 16, 16)
EMULATION_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef EMULATION_VECTORS

// 16-bit floating point. Conversions round to nearest even; NaN becomes 0x7fff, as on the device.

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude < 0x400) return copysignf(static_cast<float>(magnitude) * 0x1p-24f, __uint_as_float(sign));
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;  // keeps infinities and NaN
  return __uint_as_float(sign | ((magnitude << 13) + exponent));
}
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t to;
  if (x != x) return {0x7fff};
  if (magnitude >= 0x477ff000) {  // 65520
    to = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: multiples of 2^-24
    to = static_cast<uint32_t>(nearbyintf(fabsf(x) * 0x1p24f));
  } else {
    to = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return {static_cast<uint16_t>(sign | to)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

// Arithmetic. What glibc declares by the device's name, and does not have, becomes a macro.

#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
#define EMULATION_MIN_MAX(T)                       \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// Memory.

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T x) {
  *to = x;
}
template <class T>
void __stcg(T* to, T x) {
  *to = x;
}
inline void __threadfence() {}

// Threads of a block, and lanes of a warp.

inline void __syncthreads() {
  emulation::Block& block = *emulation::state.current->block;
  emulation::meet(block.all, block.threads, "__syncthreads");
}
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, 0, "__syncwarp"); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulation::exchange(mask, predicate != 0, "__ballot_sync");
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= (mask >> lane & 1 && values[lane] != 0 ? 1u : 0u) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

namespace emulation {
// `source` of a lane's number within its segment; one outside of it is the lane itself. A lane that does not take part
// gives bytes of 0xff.
template <class T, class Source>
T shuffle(unsigned mask, T x, int width, const char* what, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles are of 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  const int lane = static_cast<int>(state.current->index % warpSize), segment = lane / width * width;
  const int from = source(lane - segment);
  const uint64_t* values = exchange(mask, bits, what);
  const int at = segment + (from >= 0 && from < width ? from : lane - segment);
  const uint64_t none = ~uint64_t{0};
  memcpy(&x, mask >> at & 1 ? &values[at] : &none, sizeof x);
  return x;
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, int width = warpSize) {
  return emulation::shuffle(mask, x, width, "__shfl_sync", [&](int) { return lane & (width - 1); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = warpSize) {
  return emulation::shuffle(mask, x, width, "__shfl_xor_sync", [&](int lane) { return lane ^ bits; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = warpSize) {
  return emulation::shuffle(mask, x, width, "__shfl_down_sync", [&](int lane) { return lane + static_cast<int>(by); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = warpSize) {
  return emulation::shuffle(mask, x, width, "__shfl_up_sync", [&](int lane) { return lane - static_cast<int>(by); });
}

// The host's side.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorSymbolNotFound = 500,
  cudaErrorInvalidClusterSize = 912,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorSymbolNotFound:
      return "named symbol not found";
    case cudaErrorInvalidClusterSize:
      return "Invalid cluster size";
  }
  return "unrecognized error code";
}
typedef struct CUstream_st* cudaStream_t;

namespace emulation {
inline thread_local cudaError_t last_error = cudaSuccess;
inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
// What cudaFuncSetAttribute allows a kernel beyond the 48 KiB that all may have.
inline std::map<const void*, size_t> shared_limits;
inline size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = shared_limits.find(kernel);
  return max(found != shared_limits.end() ? found->second : 0, size_t{48} << 10);
}
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
inline cudaError_t cudaSetDevice(int device) {
  return emulation::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulation::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kSharedLimit;
      return cudaSuccess;
  }
  return emulation::remember(cudaErrorInvalidValue);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulation::kSharedLimit) {
    return emulation::remember(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(emulation::state.mutex);
  emulation::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Runs the kernel to its end, or throws a std::runtime_error that says what a thread did wrong.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& of = config->attrs[i].val.clusterDim;
    cluster = dim3(of.x, of.y, of.z);
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return emulation::remember(cudaErrorInvalidConfiguration);
  }
  if (blocks == 0 || blocks > 8 || grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return emulation::remember(cudaErrorInvalidClusterSize);
  }
  if (config->dynamicSmemBytes > emulation::shared_limit(reinterpret_cast<const void*>(kernel))) {
    return emulation::remember(cudaErrorInvalidValue);
  }
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulation::launch(grid, block, cluster, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

#include "hopper.h"

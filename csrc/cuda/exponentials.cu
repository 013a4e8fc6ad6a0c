// What stands between the products of paths A to C for Hopper: the end of rows whose sums lie in splits, and the
// last step of dX.
//
// Dimensions: N labelled rows, H hidden size, V vocabulary size.
#include <stdexcept>

#include "exponentials.cuh"
#include "row.cuh"

namespace dpo_kernels::cuda {
namespace {

constexpr int kWarpRows = 8, kRowLanes = 32 / kWarpRows, kJoinThreads = 128;
static_assert(kRowLanes == kLabelStatsFields - kLabelBefore);

// A warp has kWarpRows rows, whose parts are neighbours in memory, and kRowLanes of its threads take turns with the
// splits of one.
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(Parts parts, int splits, const float* shifts, double outer, float far_above,
                double slope, int64_t n, Finished<float> finished, Joined out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, first = lane / kWarpRows;
  const int64_t own =
      (static_cast<int64_t>(blockIdx.x) * (kJoinThreads / 32) + threadIdx.x / 32) * kWarpRows + lane % kWarpRows;
  const int64_t row = own < n ? own : n - 1;
  const auto at = [&](PartField f, int split) {
    return parts.data[f * parts.field_stride + split * parts.split_stride + row];
  };
  const auto together = [](auto x, auto combine) {
    for (int distance = kWarpRows; distance < 32; distance *= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, distance));
    }
    return x;
  };
  const auto largest = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](double a, double b) { return a + b; };

  float top = -FLT_MAX;
#pragma unroll 4
  for (int split = first; split < splits; split += kRowLanes) top = fmaxf(top, at(kPartMax, split));
  top = together(top, largest);

  const bool stats = finished.stats.count > 0, shifted = shifts != nullptr;
  float shift = top;
  if (shifted && !is_far(top, shifts[row], far_above)) shift = shifts[row];
  const auto of_label = [&](LabelField f) { return parts.label[f * parts.label_stride + row]; };
  const int label_split = stats ? __float_as_int(of_label(kLabelSplit)) : 0;
  // the largest entry before the label
  float before = stats ? parts.label[(kLabelBefore + first) * parts.label_stride + row] : 0;
  double sum = 0, sum_z = 0, sum_ez = 0, sum_sq = 0;
#pragma unroll 4
  for (int split = first; split < splits; split += kRowLanes) {
    const float of_split = at(kPartMax, split);
    const double part = at(kPartSum, split);
    const double apart = shifted ? 0 : outer * (static_cast<double>(of_split) - shift), factor = exp(apart);
    sum += part * factor;
    if (stats) {
      sum_z += at(kPartSumZ, split);
      sum_ez += (outer * at(kPartSumEz, split) + part * apart) * factor;
      sum_sq += at(kPartSumSq, split) * factor * factor;
      if (split < label_split) before = fmaxf(before, of_split);
    }
  }
  sum = together(sum, plus);
  if (stats) {
    sum_z = together(sum_z, plus);
    sum_ez = together(sum_ez, plus);
    sum_sq = together(sum_sq, plus) / (shifted ? static_cast<double>(kSquared) * kSquared : 1);
    before = together(before, largest);
  }
  if (first != 0 || own >= n) return;
  // of no entries beside the label, the least number that there is
  const auto scaled = [&](float u) { return u == -FLT_MAX ? -FLT_MAX : outer * u; };
  const float target = of_label(kLabelLogit);
  const double others = finished.write(
      out.places == nullptr ? row : out.places[row],
      {scaled(top), scaled(shift), outer * target, sum, outer * sum_z, sum_ez, sum_sq, target > before});
  if (out.scale == nullptr) return;
  out.top[row] = top;
  out.scale[row] = static_cast<float>(-slope * others);
  out.label[row] = static_cast<float>(-sum * of_label(kLabelDerivative));
}

template <class O>
__global__ void __launch_bounds__(kThreads)
    dhidden_kernel(TileRows<float> sums, TileRows<O> out, TileRows<__nv_bfloat16> w, const int64_t* y,
                   const float* scale, const float* label) {
  const int64_t n = blockIdx.x;
  const Row<__nv_bfloat16> own = w[y[n]];
  const float factor = scale == nullptr ? 1 : scale[n], of_label = label[n];
  map_row(sums[n], out[n], 0, 1, [&](auto& x, int i) {
    constexpr int count = sizeof(x) / sizeof(float);
#pragma unroll
    for (int k = 0; k < count; ++k) x[k] = factor * fmaf(of_label, widen(own[i + k]), x[k]);
  });
}

}  // namespace

void join(const Transform& transform, const Parts& parts, int splits, int64_t n, int64_t v,
          const Stats& stats, const float* shift, double far_above, const Joined& out, cudaStream_t stream) {
  const double outer = Scales(transform).outer;
  constexpr int rows = kJoinThreads / 32 * kWarpRows;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((n + rows - 1) / rows));
  config.blockDim = dim3(kJoinThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, join_kernel, parts, splits, shift, outer, static_cast<float>(far_above / outer),
                           transform.slope(), n,
                           Finished<float>{out.logp, out.norm, out.values, out.places == nullptr ? n : out.positions, v,
                                           stats},
                           out),
        "launch of the kernel that puts splits together");
}

void dhidden(DType out_type, const Matrix& sums, const Matrix& w, const int64_t* y, const float* scale,
             const float* label, void* out, cudaStream_t stream) {
  const int h = static_cast<int>(sums.columns);
  const auto with = [&](auto o) {
    using O = decltype(o);
    run(dhidden_kernel<O>, sums.rows, 1, stream, TileRows<float>{static_cast<float*>(sums.data), sums.stride, h},
        TileRows<O>{static_cast<O*>(out), h, h},
        TileRows<__nv_bfloat16>{static_cast<__nv_bfloat16*>(w.data), w.stride, h}, y, scale, label);
  };
  out_type == DType::bf16 ? with(__nv_bfloat16()) : with(float());
}

}  // namespace dpo_kernels::cuda

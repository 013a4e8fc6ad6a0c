// The module dpo_kernels._cuda. Every call puts its kernels on `stream`, which is of the current device, and returns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../operands.h"
#include "kernels.h"

namespace py = pybind11;
using namespace dpo_kernels;

PYBIND11_MODULE(_cuda, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  define_operands(m);

#ifdef CUDART_VERSION  // 1000 major + 10 minor, of the runtime that is linked in; the tests' emulation has none
  m.attr("CUDA_VERSION") = CUDART_VERSION;
#endif
  m.attr("CLUSTER_BLOCKS") = cuda::kClusterBlocks;
  m.attr("CLUSTER_ROWS") = cuda::kClusterRows;
  m.attr("BLOCK_COLUMNS") = cuda::kBlockColumns;
  m.attr("PART_FIELDS") = static_cast<int>(cuda::kPartFields);
  m.attr("PART_STATS_FIELDS") = static_cast<int>(cuda::kPartStatsFields);

  const auto local = py::module_local();
  py::class_<cuda::GradRows>(m, "GradRows", local)
      .def(py::init([](Address norm, int64_t norm_stride, Address logp, Address g) {
        return cuda::GradRows{as<const void>(norm), norm_stride, as<const void>(logp), as<const void>(g)};
      }));
  py::class_<cuda::Matrix>(m, "Matrix", local)
      .def(py::init([](Address data, int64_t rows, int64_t columns, int64_t stride) {
        return cuda::Matrix{as<void>(data), rows, columns, stride};
      }));

  py::class_<cuda::Positions>(m, "Positions", local).def(py::init([](Address data, int64_t stride_s, int64_t stride_t) {
    return cuda::Positions{as<const void>(data), stride_s, stride_t};
  }));
  py::class_<cuda::Labels>(m, "Labels", local)
      .def(py::init([](Address data, int64_t stride_s, int64_t stride_t, int64_t sequences, int64_t length,
                       int64_t ignore_index) {
        return cuda::Labels{as<const int64_t>(data), stride_s, stride_t, sequences, length, ignore_index};
      }));

  m.def(
      "fold",
      [](const std::string& dtype, const Tile& tile, const FoldState& state, const std::string& out_dtype,
         const cuda::Matrix& out, const cuda::Matrix& sums, bool stats, Address stream) {
        cuda::fold(dtype_of(dtype), tile, state, dtype_of(out_dtype), out, sums, stats, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "dlogits",
      [](const std::string& dtype, const Tile& tile, const std::string& out_dtype, const cuda::Matrix& out,
         const cuda::GradRows& grad, Address value, Address stream) {
        cuda::dlogits(dtype_of(dtype), tile, dtype_of(out_dtype), out, grad, as<void>(value), as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "finish",
      [](const std::string& dtype, const FoldState& state, Address y, int64_t n, int64_t v,
         const std::vector<int>& stats, Address logp, Address norm, Address values, Address stream) {
        cuda::finish(dtype_of(dtype), state, as<const int64_t>(y), n, v, stats_of(stats), as<void>(logp), as<void>(norm),
                     as<void>(values), as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "logits_fwd",
      [](const std::string& dtype, const LogitsRows& logits, const cuda::Labels& labels, int64_t v,
         int64_t num_labelled, const std::vector<int>& stats, Address logp, Address norm, Address values, Address fit,
         Address stream) {
        cuda::logits_fwd(dtype_of(dtype), logits, labels, v, num_labelled, stats_of(stats), as<void>(logp), as<void>(norm),
                         as<void>(values), as<int>(fit), as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "logits_bwd",
      [](const std::string& dtype, const LogitsRows& logits, const LogitsRows& out, const cuda::Labels& labels,
         int64_t v, Address norm, Address logp, const cuda::Positions& g, Address stream) {
        cuda::logits_bwd(dtype_of(dtype), logits, out, labels, v, as<const void>(norm), as<const void>(logp), g,
                         as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "linear_fold",
      [](const std::string& dtype, const cuda::Matrix& x, const cuda::Matrix& w, Address bias, Address y,
         const Transform& transform, const FoldState& state, int splits, Address part, Address part_argmax, bool stats,
         int processors, Address stream) {
        const cuda::LinearFold args{x,         w,      as<const void>(bias), as<const int64_t>(y),
                                    transform, splits, as<float>(part),      as<int64_t>(part_argmax)};
        cuda::linear_fold(dtype_of(dtype), args, state, stats, processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "sum_tokens",
      [](const std::string& dtype, const cuda::Positions& logps, const cuda::Labels& labels,
         const cuda::Positions& weights, bool mean, Address sums, Address counts, Address stream) {
        cuda::sum_tokens(dtype_of(dtype), logps, labels, weights, mean, as<void>(sums), as<int64_t>(counts),
                         as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "sum_tokens_bwd",
      [](const std::string& dtype, Address grad, int64_t grad_stride, const cuda::Positions& logps,
         const cuda::Labels& labels, const cuda::Positions& weights, Address counts, Address dlogps, Address dweights,
         Address stream) {
        cuda::sum_tokens_bwd(dtype_of(dtype), as<const void>(grad), grad_stride, logps, labels, weights,
                             as<const int64_t>(counts), as<void>(dlogps), as<void>(dweights), as<CUstream_st>(stream));
      },
      release_gil());
}

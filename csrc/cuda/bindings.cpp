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
  m.attr("LABEL_FIELDS") = static_cast<int>(cuda::kLabelFields);
  m.attr("LABEL_STATS_FIELDS") = static_cast<int>(cuda::kLabelStatsFields);
  m.attr("FACTORS") = static_cast<int>(cuda::kFactors);
  m.attr("ROW_FIELDS") = static_cast<int>(kRowFields);
  m.attr("NOTES") = static_cast<int>(kNotes);

  const auto local = py::module_local();
  py::class_<cuda::GradRows>(m, "GradRows", local)
      .def(py::init([](Address norm, int64_t norm_stride, Address logp, Address g) {
        return cuda::GradRows{as<const void>(norm), norm_stride, as<const void>(logp), as<const void>(g)};
      }));
  py::class_<cuda::Matrix>(m, "Matrix", local)
      .def(py::init([](Address data, int64_t rows, int64_t columns, int64_t stride) {
        return cuda::Matrix{as<void>(data), rows, columns, stride};
      }));

  py::class_<cuda::Labels>(m, "Labels", local)
      .def(py::init([](Address data, int64_t stride_s, int64_t stride_t, int64_t sequences, int64_t length,
                       int64_t ignore_index) {
        return cuda::Labels{as<const int64_t>(data), stride_s, stride_t, sequences, length, ignore_index};
      }));

  m.def(
      "find_rows",
      [](const std::string& dtype, const Search& search, Address rows, int64_t capacity, Address logp,
         Address values, int stats, Address notes, Address stream) {
        const FoundRows out{as<int64_t>(rows),  capacity, as<float>(logp),
                                  as<float>(values), stats,    as<int64_t>(notes)};
        cuda::find_rows(label_type_of(dtype), search, out, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "gather_rows",
      [](const std::string& dtype, const LogitsRows& hidden, int64_t of_sequence, Address slots,
         const cuda::Matrix& out, Address broken, Address stream) {
        cuda::gather_rows(dtype_of(dtype), hidden, of_sequence, as<const int64_t>(slots), out, as<int64_t>(broken),
                          as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "put_rows",
      [](const std::string& out_dtype, const cuda::Matrix& rows, const Positions& g, Address sequence,
         Address position, int64_t length, Address out, Address stream) {
        cuda::put_rows(dtype_of(out_dtype), rows, g, as<const int64_t>(sequence), as<const int64_t>(position), length,
                       as<void>(out), as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "compare",
      [](const std::string& dtype, const Comparison& of, const PairRows& rows, Address begins, Address ends,
         Address stream) {
        cuda::compare(dtype_of(dtype), of, rows, as<int64_t>(begins), as<int64_t>(ends), as<CUstream_st>(stream));
      },
      release_gil());
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
      "scale",
      [](const std::string& dtype, const cuda::Matrix& rows, Address factor, Address stream) {
        cuda::scale(dtype_of(dtype), rows, as<const void>(factor), as<CUstream_st>(stream));
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
         int64_t v, Address norm, Address logp, const Positions& g, Address stream) {
        cuda::logits_bwd(dtype_of(dtype), logits, out, labels, v, as<const void>(norm), as<const void>(logp), g,
                         as<CUstream_st>(stream));
      },
      release_gil());
  py::class_<cuda::LinearProduct>(m, "LinearProduct", local)
      .def(py::init([](const cuda::Matrix& x, const cuda::Matrix& w, Address bias, Address y, int64_t first,
                       const Transform& transform, int splits) {
        return cuda::LinearProduct{x, w, as<const void>(bias), as<const int64_t>(y), first, transform, splits};
      }));
  py::class_<cuda::Parts>(m, "Parts", local)
      .def(py::init([](Address data, int64_t split_stride, int64_t field_stride, Address label, int64_t label_stride) {
        return cuda::Parts{as<float>(data), split_stride, field_stride, as<float>(label), label_stride};
      }));

  py::class_<cuda::Weighed>(m, "Weighed", local)
      .def(py::init([](const cuda::Matrix& e, const cuda::Matrix& weights, int64_t first, int first_block) {
        return cuda::Weighed{e, weights, first, first_block};
      }));

  m.def(
      "linear_fold",
      [](const std::string& dtype, const cuda::LinearProduct& product, const cuda::Parts& parts, bool stats,
         Address far, int processors, Address stream) {
        cuda::linear_fold(dtype_of(dtype), product, parts, stats, as<int>(far), processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "linear_exp",
      [](const cuda::LinearProduct& product, const cuda::Parts& parts, int first_split, const cuda::Matrix& e,
         bool packed, Address shift, int64_t shift_stride, Address far, double far_above, bool again, int all_splits,
         bool stats, int processors, Address stream) {
        const cuda::Exponentials out{e,         packed, as<float>(shift), shift_stride, as<int>(far),
                                     far_above, again,  all_splits};
        cuda::linear_exp(product, parts, first_split, out, stats, processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "linear_dlogits",
      [](const cuda::LinearProduct& product, const cuda::Matrix& out, const cuda::GradRows& grad, Address missing,
         int processors, Address stream) {
        cuda::linear_dlogits(product, out, grad, as<float>(missing), processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "join",
      [](const Transform& transform, const cuda::Parts& parts, int splits, int64_t n, int64_t v,
         const std::vector<int>& stats, Address shift, double far_above, Address logp, Address norm, Address values,
         Address top, Address scale, Address label, Address places, int64_t positions, Address stream) {
        const cuda::Joined out{as<float>(logp),  as<float>(norm),  as<float>(values),          as<float>(top),
                               as<float>(scale), as<float>(label), as<const int64_t>(places), positions};
        cuda::join(transform, parts, splits, n, v, stats_of(stats), as<const float>(shift),
                   far_above, out, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "weigh",
      [](const Transform& transform, const cuda::Matrix& weights, Address y, Address top, Address scale, Address label,
         Address g, Address own, Address stream) {
        const cuda::RowWeights rows{as<const int64_t>(y),   as<const float>(top), as<const float>(scale),
                                    as<const float>(label), as<const float>(g),   as<float>(own)};
        cuda::weigh(transform, weights, rows, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "linear_dhidden",
      [](const cuda::Weighed& of, const cuda::Weighed& rest, const cuda::Matrix& w, const cuda::Matrix& out,
         int parts, int processors, Address stream) {
        cuda::linear_dhidden(of, rest, w, out, parts, processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "linear_dweight",
      [](const cuda::Weighed& of, const cuda::Matrix& x, const std::string& out_dtype, const cuda::Matrix& out,
         bool add, Address bias, int processors, Address stream) {
        cuda::linear_dweight(of, x, dtype_of(out_dtype), out, add, as<float>(bias), processors, as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "dhidden",
      [](const std::string& out_dtype, const cuda::Matrix& sums, const cuda::Matrix& w, Address y, Address scale,
         Address label, Address out, Address stream) {
        cuda::dhidden(dtype_of(out_dtype), sums, w, as<const int64_t>(y), as<const float>(scale),
                      as<const float>(label), as<void>(out), as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "sum_tokens",
      [](const std::string& dtype, const Positions& logps, const cuda::Labels& labels,
         const Positions& weights, bool mean, Address sums, Address counts, Address stream) {
        cuda::sum_tokens(dtype_of(dtype), logps, labels, weights, mean, as<void>(sums), as<int64_t>(counts),
                         as<CUstream_st>(stream));
      },
      release_gil());
  m.def(
      "sum_tokens_bwd",
      [](const std::string& dtype, Address grad, int64_t grad_stride, const Positions& logps,
         const cuda::Labels& labels, const Positions& weights, Address counts, Address dlogps, Address dweights,
         Address stream) {
        cuda::sum_tokens_bwd(dtype_of(dtype), as<const void>(grad), grad_stride, logps, labels, weights,
                             as<const int64_t>(counts), as<void>(dlogps), as<void>(dweights), as<CUstream_st>(stream));
      },
      release_gil());
}

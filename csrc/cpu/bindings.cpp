// The module dpo_kernels._native: the kernels of the widest instruction set that this machine has.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../operands.h"
#include "kernels.h"

using namespace dpo_kernels;

namespace {

// From the widest vectors to the narrowest.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  for (const Kernels* k : {avx512_kernels(), avx2_kernels(), baseline_kernels()}) {
    if (k) found.push_back(k);
  }
  return found;
}

const Kernels* kernels = available().front();

void use_isa(const std::string& name) {
  for (const Kernels* k : available()) {
    if (name == k->name) {
      kernels = k;
      return;
    }
  }
  throw std::invalid_argument("isa: this machine has no kernels named '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  using release_gil = py::call_guard<py::gil_scoped_release>;

  define_operands(m);
  py::class_<Rows>(m, "Rows", py::module_local())
      .def(py::init([](Address sequence, Address position, Address y, int64_t n, int64_t v) {
        return Rows{as<const int64_t>(sequence), as<const int64_t>(position), as<const int64_t>(y), n, v};
      }));

  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available()) names.push_back(k->name);
    return names;
  });
  m.def("isa", [] { return std::string(kernels->name); });
  m.def("use_isa", use_isa);
  m.def("is_intel", [] {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel") != 0;
#else
    return false;
#endif
  });
  m.def("set_openmp", [](Address parallel, Address get_thread_num, Address get_num_threads) {
    set_openmp({as<void(void (*)(void*), void*, unsigned, unsigned)>(parallel), as<int()>(get_thread_num),
                as<int()>(get_num_threads)});
  });

  m.def(
      "fold",
      [](const std::string& dtype, const Tile& tile, const FoldState& state, Address rescale, bool stats, int threads) {
        kernels->fold(dtype_of(dtype), tile, state, as<void>(rescale), stats, threads);
      },
      release_gil());
  // Of no entries.
  m.def(
      "begin",
      [](const FoldState& state, int64_t n) {
        for (int field = 0; field < kFields; ++field) {
          const double value = field == kMax         ? std::numeric_limits<float>::lowest()
                               : field == kTarget    ? -std::numeric_limits<double>::infinity()
                               : field == kLabelSlope ? 1
                                                      : 0;
          std::fill_n(state.data + field * state.stride, n, value);
        }
        std::fill_n(state.argmax, n, -1);
      },
      release_gil());
  m.def(
      "put_labels",
      [](const std::string& dtype, const Tile& tile, Address value) {
        const auto put = [&](auto* a, const auto* of) {
          for (int64_t row = 0; row < tile.n; ++row) {
            const int64_t column = tile.y[row] - tile.start;
            if (column >= 0 && column < tile.v) a[row * tile.v + column] = of[row];
          }
        };
        dtype_of(dtype) == DType::f64 ? put(static_cast<double*>(tile.a), as<const double>(value))
                                      : put(static_cast<float*>(tile.a), as<const float>(value));
      },
      release_gil());
  m.def(
      "dlogits",
      [](const std::string& dtype, const Tile& tile, Address out, Address norm, int64_t norm_stride, Address logp,
         Address g, Address value, int threads) {
        kernels->dlogits(dtype_of(dtype), tile, as<void>(out), as<void>(norm), norm_stride, as<void>(logp), as<void>(g),
                         as<void>(value), threads);
      },
      release_gil());
  m.def(
      "logits_fold",
      [](const std::string& dtype, const LogitsRows& logits, const Rows& rows, const FoldState& state, bool stats,
         int threads) { kernels->logits_fold(dtype_of(dtype), logits, rows, state, stats, threads); },
      release_gil());
  m.def(
      "logits_bwd",
      [](const std::string& dtype, const LogitsRows& logits, const LogitsRows& out, const Rows& rows, Address norm,
         int64_t norm_stride, Address logp, Address g, int threads) {
        kernels->logits_bwd(dtype_of(dtype), logits, out, rows, as<void>(norm), norm_stride, as<void>(logp),
                            as<void>(g), threads);
      },
      release_gil());
  m.def(
      "finish",
      [](const std::string& dtype, const FoldState& state, Address y, int64_t n, int64_t v,
         const std::vector<int>& stats, Address logp, Address norm, Address values, int threads) {
        kernels->finish(dtype_of(dtype), state, as<const int64_t>(y), n, v, stats_of(stats), as<void>(logp),
                        as<void>(norm), as<void>(values), threads);
      },
      release_gil());
  m.def(
      "transpose",
      [](Address a, Address out, int64_t n, int64_t v, int threads) {
        kernels->transpose(as<const float>(a), as<float>(out), n, v, threads);
      },
      release_gil());
  m.def(
      "find_rows",
      [](const std::string& dtype, const Search& search, Address rows, int64_t capacity, Address logp, Address values,
         int stats, Address notes) {
        find_rows(label_type_of(dtype), search,
                  {as<int64_t>(rows), capacity, as<float>(logp), as<float>(values), stats, as<int64_t>(notes)});
      },
      release_gil());
  m.def(
      "gather_rows",
      [](const std::string& dtype, const LogitsRows& hidden, int64_t of_sequence, int64_t h, Address slots, int64_t n,
         Address out, Address broken, int threads) {
        gather_rows(dtype_of(dtype), hidden, of_sequence, h, as<const int64_t>(slots), n, as<void>(out),
                    as<int64_t>(broken), threads);
      },
      release_gil());
  m.def(
      "compare",
      [](const std::string& dtype, const Comparison& of, const PairRows& rows) { compare(dtype_of(dtype), of, rows); },
      release_gil());
  m.def("exp", [](Address x, int64_t n) { kernels->exp(as<float>(x), n); }, release_gil());
  m.def("tanh", [](Address x, Address slope, int64_t n) { kernels->tanh(as<float>(x), as<float>(slope), n); },
        release_gil());
}

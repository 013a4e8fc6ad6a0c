// What both modules, dpo_kernels._native and dpo_kernels._cuda, take from Python: raw addresses and sizes. They know no
// tensors, so one binary serves every version of PyTorch; dpo_kernels/impl checks shapes, types and strides before.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "finish.h"
#include "pairs.h"
#include "positions.h"
#include "tiles.h"

namespace dpo_kernels {

namespace py = pybind11;

using Address = uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype: expected float32, float64, bfloat16 or float16, got '" + name + "'");
}

inline LabelType label_type_of(const std::string& name) {
  if (name == "int64") return LabelType::i64;
  if (name == "int32") return LabelType::i32;
  if (name == "int16") return LabelType::i16;
  if (name == "int8") return LabelType::i8;
  if (name == "uint8") return LabelType::u8;
  throw std::invalid_argument("dtype: expected int64, int32, int16, int8 or uint8, got '" + name + "'");
}

inline Stats stats_of(const std::vector<int>& names) {
  Stats stats{static_cast<int>(names.size()), {}};
  if (names.size() > 4) throw std::invalid_argument("stats: expected at most 4, got more");
  std::copy(names.begin(), names.end(), stats.names);
  return stats;
}

inline void define_operands(py::module_& m) {
  const auto local = py::module_local();  // each module has its own
  py::class_<Transform>(m, "Transform", local).def(py::init<double, double, double>());
  py::class_<FoldState>(m, "FoldState", local).def(py::init([](Address data, int64_t stride, Address argmax) {
    return FoldState{as<double>(data), stride, as<int64_t>(argmax)};
  }));
  py::class_<Tile>(m, "Tile", local)
      .def(py::init([](Address a, int64_t n, int64_t v, int64_t start, Address y, Address bias, const Transform& t) {
        return Tile{as<void>(a), n, v, start, as<const int64_t>(y), as<const void>(bias), t};
      }));
  py::class_<LogitsRows>(m, "LogitsRows", local)
      .def(py::init([](Address data, int64_t stride_s, int64_t stride_t, int64_t stride_v) {
        return LogitsRows{as<void>(data), stride_s, stride_t, stride_v};
      }));
  py::class_<Positions>(m, "Positions", local).def(py::init([](Address data, int64_t stride_s, int64_t stride_t) {
    return Positions{as<const void>(data), stride_s, stride_t};
  }));
  py::class_<Search>(m, "Search", local)
      .def(py::init([](const Positions& labels, int64_t sequences, int64_t length, int shift,
                       int64_t ignore_index, int64_t v, int64_t expected, const Positions& predictors,
                       int64_t slots, bool asserts) {
        return Search{labels, sequences, length, shift, ignore_index, v, expected, predictors, slots, asserts};
      }));
  py::class_<Comparison>(m, "Comparison", local)
      .def(py::init([](Address token_logps, int64_t length, const Positions& weights, Address sums, Address slopes,
                       Address counts, Address references, Address losses, Address chosen_rewards,
                       Address rejected_rewards, Address loss, double beta, int64_t pairs, int64_t first,
                       int64_t stop) {
        return Comparison{as<void>(token_logps), length, weights, as<void>(sums), as<void>(slopes),
                          as<int64_t>(counts), as<const void>(references), as<void>(losses), as<void>(chosen_rewards),
                          as<void>(rejected_rewards), as<void>(loss), beta, pairs, first, stop};
      }));
  py::class_<PairRows>(m, "PairRows", local)
      .def(py::init([](Address sequence, Address position, Address logps, Address slopes, int64_t n) {
        return PairRows{as<const int64_t>(sequence), as<const int64_t>(position), as<const void>(logps),
                        as<void>(slopes), n};
      }));
}

}  // namespace dpo_kernels

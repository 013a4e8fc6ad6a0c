// What both modules, dpo_kernels._native and dpo_kernels._cuda, take from Python: raw addresses and sizes. They know no
// tensors, so one binary serves every version of PyTorch; dpo_kernels/impl checks shapes, types and strides before.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "finish.h"
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
}

}  // namespace dpo_kernels

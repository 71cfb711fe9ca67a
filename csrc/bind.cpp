// The Python module updp._C: raw pointers in, checked against the shapes and strides that come with them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_attention.h"
#include "bind_conv.h"
#include "bind_layer_norm.h"
#include "dwcompose.h"
#include "registry.h"

namespace py = pybind11;

namespace {

using Pair = std::array<int64_t, 2>;
// Address, shape and strides (in elements) of a tensor whose dtype the kernel's name says.
using Array = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>>;

// A dense (C, h, w) weight; throws std::invalid_argument if it is anything else.
void check_weight(const std::string& name, const Array& array) {
  const auto& [address, shape, strides] = array;
  if (shape.size() != 3 || strides.size() != 3)
    throw std::invalid_argument("dwcompose: " + name + " needs three dimensions (C, h, w)");
  int64_t dense = 1;
  for (int axis = 2; axis >= 0; --axis) {
    if (shape[axis] < (axis == 0 ? 0 : 1))
      throw std::invalid_argument("dwcompose: " + name + " has a size of " + std::to_string(shape[axis]));
    if (shape[axis] > 1 && strides[axis] != dense)
      throw std::invalid_argument("dwcompose: " + name + " is not contiguous");
    if (__builtin_mul_overflow(dense, shape[axis], &dense))
      throw std::invalid_argument("dwcompose: the size of " + name + " overflows");
  }
  if (address == 0 && dense > 0) throw std::invalid_argument("dwcompose: " + name + " is a null pointer");
}

template <typename T>
void run_dwcompose(const updp::Kernel& kernel, const updp::DwComposeGeometry& geometry, const Array& outer,
                   const Array& inner, const Array& out, int threads) {
  updp::dwcompose<T>(reinterpret_cast<updp::DwComposeKernel<T>>(kernel.function), geometry,
                     reinterpret_cast<const T*>(std::get<0>(outer)),
                     reinterpret_cast<const T*>(std::get<0>(inner)), reinterpret_cast<T*>(std::get<0>(out)),
                     threads);
}

void dwcompose(const std::string& variant, const Array& outer, const Array& inner, const Array& out,
               const Pair& inner_stride, const Pair& inner_dilation, const Pair& outer_dilation,
               int threads) {
  const updp::Kernel& kernel = updp::find_kernel("dwcompose", variant);
  check_weight("outer", outer);
  check_weight("inner", inner);
  check_weight("out", out);
  const auto &outer_shape = std::get<1>(outer), &inner_shape = std::get<1>(inner),
             &out_shape = std::get<1>(out);
  const updp::DwComposeGeometry geometry{outer_shape[0],
                                         {outer_shape[1], outer_shape[2]},
                                         {inner_shape[1], inner_shape[2]},
                                         {inner_stride[0], inner_stride[1]},
                                         {inner_dilation[0], inner_dilation[1]},
                                         {outer_dilation[0], outer_dilation[1]}};
  int64_t size[2];
  updp::dwcompose_out_size(geometry, size);
  if (inner_shape[0] != outer_shape[0] || out_shape != std::vector<int64_t>{outer_shape[0], size[0], size[1]})
    throw std::invalid_argument("dwcompose: outer, inner and out do not fit each other, out should be " +
                                std::to_string(outer_shape[0]) + " x " + std::to_string(size[0]) + " x " +
                                std::to_string(size[1]));
  if (threads < 1) throw std::invalid_argument("dwcompose: threads must be at least 1");
  const py::gil_scoped_release released;
  if (kernel.dtype == "f64") run_dwcompose<double>(kernel, geometry, outer, inner, out, threads);
  if (kernel.dtype == "f32") run_dwcompose<float>(kernel, geometry, outer, inner, out, threads);
}

using Row = std::tuple<std::string, std::string, std::string, std::string, std::string, bool>;

std::vector<Row> rows() {
  std::vector<Row> result;
  for (const updp::Kernel& k : updp::kernels())
    result.emplace_back(k.name(), k.op, k.algorithm, k.dtype, k.isa, k.available());
  return result;
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> result;
  for (const updp::CpuFeature& feature : updp::cpu_features()) result.emplace(feature.name, feature.present);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of updp; use them through updp.ops.";
  module.def("rows", &rows, "Rows of csrc/kernels.def: (name, op, algorithm, dtype, isa, available here).");
  module.def("cpu_features", &cpu_features, "CPU features that dispatch asks for.");
  module.def("dwcompose", &dwcompose, py::arg("variant"), py::arg("outer"), py::arg("inner"), py::arg("out"),
             py::arg("inner_stride"), py::arg("inner_dilation"), py::arg("outer_dilation"),
             py::arg("threads"),
             "Run one dwcompose row. Arrays are (address, shape, strides) of dense (C, h, w) weights.");
  updp::bind_conv(module);
  updp::bind_program(module);
  updp::bind_attention(module);
  updp::bind_layer_norm(module);
}

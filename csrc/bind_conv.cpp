#include "bind_conv.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "conv_plan.h"

namespace py = pybind11;

namespace updp {
namespace {

// A geometry that has a weight and nothing else.
ConvGeometry weight_geometry(const Kernel& kernel, const Four& weight) {
  const int64_t groups = groups_of(kernel, weight);
  ConvGeometry g{1, weight[2], weight[3], weight[1], weight[0], weight[2], weight[3], 1,
                 1, 0,         0,         0,         0,         0,         0,         1};
  g.c = weight[1] * (g.groups = groups);
  conv_geometry(g);
  return g;
}

int64_t packed_size(const std::string& variant, const Four& weight) {
  const Kernel& kernel = find_kernel("conv", variant);
  return conv_packed_size(kernel.algorithm, kernel.lanes(), weight_geometry(kernel, weight));
}

void pack(const std::string& variant, const Four& shape, uintptr_t weight, uintptr_t packed,
          int64_t packed_elements) {
  const Kernel& kernel = find_kernel("conv", variant);
  const ConvGeometry g = weight_geometry(kernel, shape);
  const int64_t needed = conv_packed_size(kernel.algorithm, kernel.lanes(), g);
  if (packed_elements != needed)
    throw std::invalid_argument("conv: the packed weight has " + std::to_string(packed_elements) +
                                " elements, needs " + std::to_string(needed));
  const Floats from{"conv", "the weight", weight, g.k * conv_depth(g)},
      to{"conv", "the packed weight", packed, needed};
  from.check();
  to.check();
  if (from.overlaps(to)) throw std::invalid_argument("conv: the packed weight overlaps the weight");
  const py::gil_scoped_release released;
  conv_pack(kernel.algorithm, kernel.lanes(), g, reinterpret_cast<const float*>(weight),
            reinterpret_cast<float*>(packed));
}

}  // namespace

void bind_conv(py::module_& module) {
  module.def("conv_packed_size", &packed_size, py::arg("variant"), py::arg("weight_shape"),
             "Elements of the packed form of a (k, c / groups, kh, kw) weight.");
  module.def("conv_pack", &pack, py::arg("variant"), py::arg("weight_shape"), py::arg("weight"),
             py::arg("packed"), py::arg("packed_elements"),
             "Pack a contiguous float32 weight; both are addresses.");
  py::class_<ConvPlan>(module, "ConvPlan", "One conv row on arrays of given sizes, NHWC and dense.")
      .def(py::init<const std::string&, const Four&, const Four&, const std::array<int64_t, 2>&,
                    const Four&>(),
           py::arg("variant"), py::arg("input"), py::arg("weight"), py::arg("stride"), py::arg("padding"))
      .def_property_readonly("out_shape", &ConvPlan::out_shape)
      .def_property_readonly("packed_size", &ConvPlan::packed_size)
      .def("run", &ConvPlan::run, py::arg("x"), py::arg("packed"), py::arg("out"), py::arg("bias"),
           py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("residual_shared"),
           py::arg("activation"), py::arg("residual_first"), py::arg("threads"),
           "Run on float32 arrays at these addresses, 0 for none.");
}

}  // namespace updp

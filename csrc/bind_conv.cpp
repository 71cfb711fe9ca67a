#include "bind_conv.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "conv.h"
#include "registry.h"

namespace py = pybind11;

namespace updp {
namespace {

using Four = std::array<int64_t, 4>;

// An array of floats as it comes in: where it begins, and how many elements it has to have.
struct Floats {
  const char* name;
  uintptr_t address;
  int64_t elements;

  void check() const {
    if (address == 0 && elements > 0)
      throw std::invalid_argument(std::string("conv: ") + name + " is a null pointer");
    if (address % alignof(float) != 0)
      throw std::invalid_argument(std::string("conv: ") + name + " is at " + std::to_string(address) +
                                  ", allowed: multiples of 4");
    if (address + static_cast<uintptr_t>(elements) * sizeof(float) < address)
      throw std::invalid_argument(std::string("conv: ") + name + " reaches beyond the end of memory");
  }
  bool overlaps(const Floats& other) const {
    return address < other.address + other.elements * sizeof(float) &&
           other.address < address + elements * sizeof(float);
  }
};

// A convolution of given sizes, checked once; runs on any arrays of these sizes.
class ConvPlan {
 public:
  ConvPlan(const std::string& variant, const Four& input, const Four& weight,
           const std::array<int64_t, 2>& stride, const Four& padding)
      : kernel_(find_kernel("conv", variant)) {
    if (weight[1] != input[3])
      throw std::invalid_argument("conv: the input has " + std::to_string(input[3]) +
                                  " channels, the weight is for " + std::to_string(weight[1]));
    g_ = {input[0],  input[1],   input[2],   input[3],   weight[0],  weight[2], weight[3], stride[0],
          stride[1], padding[0], padding[1], padding[2], padding[3], 0,         0};
    conv_geometry(g_);
    packed_ = conv_packed_size(kernel_.algorithm, kernel_.lanes(), g_);
    columns_ = conv_columns(g_.k, kernel_.lanes());
    blocking_ = conv_blocking(kernel_.algorithm, g_, columns_, threads_);
  }

  Four out_shape() const { return {g_.n, g_.oh, g_.ow, g_.k}; }
  int64_t packed_size() const { return packed_; }

  // Addresses; 0 for what is left out.
  void run(uintptr_t x, uintptr_t packed, uintptr_t out, uintptr_t bias, uintptr_t scale, uintptr_t shift,
           uintptr_t residual, bool residual_shared, int activation, bool residual_first, int threads) {
    const int64_t image = g_.oh * g_.ow * g_.k, outputs = g_.n * image;
    const int64_t period = residual_shared ? image : outputs;
    const auto channels = [&](uintptr_t address) { return address == 0 ? 0 : g_.k; };
    const Floats result{"out", out, outputs};
    result.check();
    for (const Floats& array :
         {Floats{"the input", x, g_.n * g_.h * g_.w * g_.c}, Floats{"the packed weight", packed, packed_},
          Floats{"bias", bias, channels(bias)}, Floats{"scale", scale, channels(scale)},
          Floats{"shift", shift, channels(shift)},
          Floats{"residual", residual, residual == 0 ? 0 : period}}) {
      array.check();
      if (array.overlaps(result))
        throw std::invalid_argument(std::string("conv: out overlaps ") + array.name);
    }
    if ((scale == 0) != (shift == 0)) throw std::invalid_argument("conv: scale and shift come together");
    if (activation < 0 || activation >= kActivations)
      throw std::invalid_argument("conv: there is no activation " + std::to_string(activation));
    if (threads < 1) throw std::invalid_argument("conv: threads must be at least 1");
    ConvJob job{g_, columns_, blocking_, {}, pointer(x), pointer(packed), reinterpret_cast<float*>(out)};
    job.epilogue = {pointer(bias),     pointer(scale), pointer(shift),
                    pointer(residual), period,         static_cast<Activation>(activation),
                    residual_first};
    if (threads != threads_) job.blocking = conv_blocking(kernel_.algorithm, g_, columns_, threads);
    const py::gil_scoped_release released;
    conv(reinterpret_cast<ConvKernel>(kernel_.function), job);
  }

 private:
  static const float* pointer(uintptr_t address) { return reinterpret_cast<const float*>(address); }

  const Kernel& kernel_;
  ConvGeometry g_;
  ConvColumns columns_;
  ConvBlocking blocking_;  // for threads_
  int64_t packed_;
  static constexpr int threads_ = 1;
};

// A geometry that has a weight and nothing else.
ConvGeometry weight_geometry(const Four& weight) {
  ConvGeometry g{1, weight[2], weight[3], weight[1], weight[0], weight[2], weight[3], 1, 1, 0, 0, 0, 0, 0, 0};
  conv_geometry(g);
  return g;
}

int64_t packed_size(const std::string& variant, const Four& weight) {
  const Kernel& kernel = find_kernel("conv", variant);
  return conv_packed_size(kernel.algorithm, kernel.lanes(), weight_geometry(weight));
}

void pack(const std::string& variant, const Four& shape, uintptr_t weight, uintptr_t packed,
          int64_t packed_elements) {
  const Kernel& kernel = find_kernel("conv", variant);
  const ConvGeometry g = weight_geometry(shape);
  const int64_t needed = conv_packed_size(kernel.algorithm, kernel.lanes(), g);
  if (packed_elements != needed)
    throw std::invalid_argument("conv: the packed weight has " + std::to_string(packed_elements) +
                                " elements, needs " + std::to_string(needed));
  const Floats from{"the weight", weight, g.k * g.c * g.kh * g.kw}, to{"the packed weight", packed, needed};
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
             "Elements of the packed form of a (k, c, kh, kw) weight.");
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

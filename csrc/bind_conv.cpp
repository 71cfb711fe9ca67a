#include "bind_conv.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "conv.h"
#include "floats.h"
#include "registry.h"
#include "sequence.h"

namespace py = pybind11;

namespace updp {
namespace {

const float* pointer(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Of what a convolution is given beside its input; 0 for what is left out.
struct Addresses {
  uintptr_t packed, bias, scale, shift, residual;
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
           uintptr_t residual, bool residual_shared, int activation, bool residual_first, int threads) const {
    const Floats result = output(out);
    check_input(x, result);
    const ConvEpilogue own =
        epilogue({packed, bias, scale, shift, residual}, residual_shared, activation, residual_first, result);
    if (threads < 1) throw std::invalid_argument("conv: threads must be at least 1");
    ConvJob job{g_, columns_, blocking_, own, pointer(x), pointer(packed), reinterpret_cast<float*>(out)};
    if (threads != threads_) job.blocking = conv_blocking(kernel_.algorithm, g_, columns_, threads);
    const py::gil_scoped_release released;
    conv(function(), job);
  }

  // The output, checked.
  Floats output(uintptr_t out) const {
    const Floats result{"out", out, g_.n * image()};
    result.check();
    return result;
  }
  void check_input(uintptr_t x, const Floats& out) const {
    check({"the input", x, g_.n * g_.h * g_.w * g_.c}, out);
  }

  // What follows the convolution, checked.
  ConvEpilogue epilogue(const Addresses& own, bool residual_shared, int activation, bool residual_first,
                        const Floats& out) const {
    const int64_t period = residual_shared ? image() : g_.n * image();
    const auto channels = [&](uintptr_t address) { return address == 0 ? 0 : g_.k; };
    check({"the packed weight", own.packed, packed_}, out);
    check({"bias", own.bias, channels(own.bias)}, out);
    check({"scale", own.scale, channels(own.scale)}, out);
    check({"shift", own.shift, channels(own.shift)}, out);
    check({"residual", own.residual, own.residual == 0 ? 0 : period}, out);
    if ((own.scale == 0) != (own.shift == 0))
      throw std::invalid_argument("conv: scale and shift come together");
    if (activation < 0 || activation >= kActivations)
      throw std::invalid_argument("conv: there is no activation " + std::to_string(activation));
    return {pointer(own.bias),
            pointer(own.scale),
            pointer(own.shift),
            pointer(own.residual),
            period,
            static_cast<Activation>(activation),
            residual_first};
  }

  SequenceStep step() const { return {function(), kernel_.algorithm, g_, columns_}; }

 private:
  int64_t image() const { return g_.oh * g_.ow * g_.k; }
  ConvKernel function() const { return reinterpret_cast<ConvKernel>(kernel_.function); }
  static void check(const Floats& array, const Floats& out) {
    array.check();
    if (array.overlaps(out)) throw std::invalid_argument(std::string("conv: out overlaps ") + array.name);
  }

  const Kernel& kernel_;
  ConvGeometry g_;
  ConvColumns columns_;
  ConvBlocking blocking_;  // for threads_
  int64_t packed_;
  static constexpr int threads_ = 1;
};

// Convolutions one behind the other, in one call. Residuals are one image, the same for all.
class ConvSequence {
 public:
  // Of each its plan, the number of its activation, and whether its residual is added before that.
  using Step = std::tuple<const ConvPlan*, int, bool>;

  ConvSequence(const std::vector<Step>& steps, int threads) : sequence_(of(steps), threads) {
    for (const auto& [plan, activation, residual_first] : steps)
      steps_.push_back({*plan, activation, residual_first});
  }

  Four out_shape() const { return steps_.back().plan.out_shape(); }

  // Addresses of each convolution's packed weight, bias, scale, shift and residual.
  void run(uintptr_t x, uintptr_t out, const std::vector<std::array<uintptr_t, 5>>& given) const {
    if (given.size() != steps_.size())
      throw std::invalid_argument("sequence: operands for " + std::to_string(given.size()) +
                                  " convolutions, there are " + std::to_string(steps_.size()));
    const Floats result = steps_.back().plan.output(out);
    steps_.front().plan.check_input(x, result);
    std::vector<SequenceOperands> operands;
    for (size_t i = 0; i < steps_.size(); ++i) {
      const auto [packed, bias, scale, shift, residual] = given[i];
      const auto& [plan, activation, residual_first] = steps_[i];
      operands.push_back({pointer(packed), plan.epilogue({packed, bias, scale, shift, residual}, true,
                                                         activation, residual_first, result)});
    }
    const py::gil_scoped_release released;
    sequence_.run(pointer(x), operands, reinterpret_cast<float*>(out));
  }

 private:
  static std::vector<SequenceStep> of(const std::vector<Step>& steps) {
    std::vector<SequenceStep> result;
    for (const Step& step : steps) {
      if (std::get<0>(step) == nullptr) throw std::invalid_argument("sequence: a convolution is missing");
      result.push_back(std::get<0>(step)->step());
    }
    return result;
  }

  struct Planned {
    ConvPlan plan;
    int activation;
    bool residual_first;
  };
  std::vector<Planned> steps_;
  Sequence sequence_;
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
  py::class_<ConvSequence>(module, "ConvSequence", "Convolutions one behind the other, strip by strip.")
      .def(py::init<const std::vector<ConvSequence::Step>&, int>(), py::arg("steps"), py::arg("threads"))
      .def_property_readonly("out_shape", &ConvSequence::out_shape)
      .def("run", &ConvSequence::run, py::arg("x"), py::arg("out"), py::arg("operands"),
           "Run on float32 arrays at these addresses: input, output, and (packed weight, bias, scale, shift, "
           "residual) of each convolution, 0 for none.");
}

}  // namespace updp

// A convolution as Python sees it: sizes checked once, addresses at every call.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bind_floats.h"
#include "conv.h"
#include "registry.h"
#include "sequence.h"

namespace updp {

inline const float* pointer(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Of what a convolution is given beside its input; 0 for what is left out.
struct Addresses {
  uintptr_t packed, bias, scale, shift, residual;
};

// Of a (k, c / groups, kh, kw) weight.
inline int64_t groups_of(const Kernel& kernel, const Four& weight) {
  if (!conv_is_depthwise(kernel.algorithm)) return 1;
  if (weight[1] != 1)
    throw std::invalid_argument("conv: depthwise is for weights of one input channel, got " +
                                std::to_string(weight[1]));
  return weight[0];
}

// A convolution of given sizes, checked once; runs on any arrays of these sizes.
class ConvPlan {
 public:
  ConvPlan(const std::string& variant, const Four& input, const Four& weight,
           const std::array<int64_t, 2>& stride, const Four& padding)
      : kernel_(find_kernel("conv", variant)) {
    const int64_t groups = groups_of(kernel_, weight);
    if (weight[1] * groups != input[3])
      throw std::invalid_argument("conv: the input has " + std::to_string(input[3]) +
                                  " channels, the weight is for " + std::to_string(weight[1] * groups));
    g_ = {input[0],  input[1],   input[2],   input[3],   weight[0],  weight[2], weight[3], stride[0],
          stride[1], padding[0], padding[1], padding[2], padding[3], 0,         0,         groups};
    conv_geometry(g_);
    packed_ = conv_packed_size(kernel_.algorithm, kernel_.lanes(), g_);
    columns_ = conv_columns(g_.k, kernel_.lanes());
    blocking_ = conv_blocking(kernel_.algorithm, g_, columns_, threads_);
  }

  Four in_shape() const { return {g_.n, g_.h, g_.w, g_.c}; }
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
    const pybind11::gil_scoped_release released;
    conv(function(), job);
  }

  // The output, checked.
  Floats output(uintptr_t out) const {
    const Floats result{"conv", "out", out, g_.n * image()};
    result.check();
    return result;
  }
  void check_input(uintptr_t x, const Floats& out) const {
    check({"conv", "the input", x, g_.n * g_.h * g_.w * g_.c}, out);
  }

  // What follows the convolution, checked.
  ConvEpilogue epilogue(const Addresses& own, bool residual_shared, int activation, bool residual_first,
                        const Floats& out) const {
    const int64_t period = residual_shared ? image() : g_.n * image();
    const auto channels = [&](uintptr_t address) { return address == 0 ? 0 : g_.k; };
    check({"conv", "the packed weight", own.packed, packed_}, out);
    check({"conv", "bias", own.bias, channels(own.bias)}, out);
    check({"conv", "scale", own.scale, channels(own.scale)}, out);
    check({"conv", "shift", own.shift, channels(own.shift)}, out);
    check({"conv", "residual", own.residual, own.residual == 0 ? 0 : period}, out);
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

}  // namespace updp

#include "bind_layer_norm.h"

#include <stdexcept>
#include <string>

#include "bind_floats.h"
#include "layer_norm.h"
#include "registry.h"

namespace py = pybind11;

namespace updp {
namespace {

// Layer norm of rows of given sizes, checked once; runs on any of these.
class LayerNormPlan {
 public:
  LayerNormPlan(const std::string& variant, int64_t rows, int64_t channels, double eps)
      : kernel_(find_kernel("layer_norm", variant)) {
    layer_norm_check(rows, channels);
    if (!(eps >= 0))
      throw std::invalid_argument("layer_norm: eps is " + std::to_string(eps) + ", allowed: from 0");
    job_.rows = rows;
    job_.channels = channels;
    job_.eps = static_cast<float>(eps);
  }

  void run(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int threads) const {
    const int64_t size = job_.rows * job_.channels;
    const Floats result{"layer_norm", "out", out, size};
    result.check();
    for (const Floats& array : {Floats{"layer_norm", "x", x, size},
                                Floats{"layer_norm", "weight", weight, weight == 0 ? 0 : job_.channels},
                                Floats{"layer_norm", "bias", bias, bias == 0 ? 0 : job_.channels}}) {
      array.check();
      if (array.overlaps(result)) result.complain(std::string("overlaps ") + array.name);
    }
    if (threads < 1) throw std::invalid_argument("layer_norm: threads must be at least 1");
    LayerNormJob job = job_;
    job.x = reinterpret_cast<const float*>(x);
    job.weight = reinterpret_cast<const float*>(weight);
    job.bias = reinterpret_cast<const float*>(bias);
    job.out = reinterpret_cast<float*>(out);
    const py::gil_scoped_release released;
    layer_norm(reinterpret_cast<LayerNormKernel>(kernel_.function), job, threads);
  }

 private:
  const Kernel& kernel_;
  LayerNormJob job_{};  // but for addresses
};

}  // namespace

void bind_layer_norm(py::module_& module) {
  py::class_<LayerNormPlan>(module, "LayerNormPlan",
                            "One layer_norm row on dense float32 rows of given sizes.")
      .def(py::init<const std::string&, int64_t, int64_t, double>(), py::arg("variant"), py::arg("rows"),
           py::arg("channels"), py::arg("eps"))
      .def("run", &LayerNormPlan::run, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
           py::arg("threads"), "Run on tensors at these addresses; a weight or bias at 0 is left out.");
}

}  // namespace updp

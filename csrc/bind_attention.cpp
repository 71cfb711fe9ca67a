#include "bind_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "bind_floats.h"
#include "registry.h"

namespace py = pybind11;

namespace updp {
namespace {

// How far a tensor (batch, heads, tokens, channels) reaches, in elements.
int64_t reach(const char* name, const Four& shape, const Four& strides) {
  int64_t last = 0;
  for (int axis = 0; axis < 4; ++axis) {
    int64_t step;
    if (strides[axis] < 0 || (axis == 3 && shape[3] > 1 && strides[3] != 1))
      throw std::invalid_argument("attention: " + std::string(name) + " has a stride of " +
                                  std::to_string(strides[axis]) + (axis == 3 ? ", need 1" : ""));
    if (shape[axis] == 0) return 0;
    if (__builtin_mul_overflow(shape[axis] - 1, strides[axis], &step) ||
        __builtin_add_overflow(last, step, &last) || last > std::numeric_limits<int64_t>::max() / 8)
      throw std::invalid_argument("attention: " + std::string(name) + " reaches too far");
  }
  return last + 1;
}

// Attention over tensors of given shapes and strides, checked once; runs on any of these.
class AttentionPlan {
 public:
  AttentionPlan(const std::string& variant, const Four& q, const Four& k, const Four& v,
                const Four& q_strides, const Four& k_strides, const Four& v_strides)
      : kernel_(find_kernel("attention", variant)) {
    if (k[0] != q[0] || v[0] != q[0] || k[1] != q[1] || v[1] != q[1] || v[2] != k[2] || k[3] != q[3])
      throw std::invalid_argument("attention: q, k and v do not fit each other");
    job_.g = {q[0], q[1], q[2], k[2], q[3], v[3]};
    attention_check(job_.g);
    reaches_ = {reach("q", q, q_strides), reach("k", k, k_strides), reach("v", v, v_strides)};
    job_.layout = attention_layout(job_.g, kernel_.lanes());
    job_.cut = attention_cut(job_.g, 1);
    job_.q_strides = {q_strides[0], q_strides[1], q_strides[2]};
    job_.k_strides = {k_strides[0], k_strides[1], k_strides[2]};
    job_.v_strides = {v_strides[0], v_strides[1], v_strides[2]};
  }

  void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, double scale, int threads) const {
    const Floats result{"attention", "out", out, job_.g.batch * job_.g.queries * job_.g.heads * job_.g.width};
    result.check();
    for (const Floats& array :
         {Floats{"attention", "q", q, reaches_[0]}, Floats{"attention", "k", k, reaches_[1]},
          Floats{"attention", "v", v, reaches_[2]}}) {
      array.check();
      if (array.overlaps(result)) result.complain(std::string("overlaps ") + array.name);
    }
    if (threads < 1) throw std::invalid_argument("attention: threads must be at least 1");
    AttentionJob job = job_;
    job.q = reinterpret_cast<const float*>(q);
    job.k = reinterpret_cast<const float*>(k);
    job.v = reinterpret_cast<const float*>(v);
    job.out = reinterpret_cast<float*>(out);
    job.scale = static_cast<float>(scale);
    if (threads != 1) job.cut = attention_cut(job.g, threads);
    const py::gil_scoped_release released;
    attention(reinterpret_cast<AttentionKernel>(kernel_.function), job);
  }

 private:
  const Kernel& kernel_;
  AttentionJob job_{};  // but for addresses; cut for one thread
  std::array<int64_t, 3> reaches_;
};

}  // namespace

void bind_attention(py::module_& module) {
  py::class_<AttentionPlan>(module, "AttentionPlan", "One attention row on float32 tensors of given shapes.")
      .def(py::init<const std::string&, const Four&, const Four&, const Four&, const Four&, const Four&,
                    const Four&>(),
           py::arg("variant"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_strides"),
           py::arg("k_strides"), py::arg("v_strides"))
      .def("run", &AttentionPlan::run, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
           py::arg("scale"), py::arg("threads"),
           "Run on tensors at these addresses; out is dense (batch, queries, heads, channels).");
}

}  // namespace updp

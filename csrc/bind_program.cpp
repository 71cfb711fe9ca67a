// Several convolutions in one call: strip by strip, or map by map.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_conv.h"
#include "conv_plan.h"

namespace py = pybind11;

namespace updp {
namespace {

// A convolution of several: its plan, the number of its activation, and whether its residual is added before
// that.
using Step = std::tuple<const ConvPlan*, int, bool>;
// Addresses of a convolution's packed weight, bias, scale, shift and residual.
using Given = std::array<uintptr_t, 5>;

const ConvPlan& plan_of(const Step& step) {
  if (std::get<0>(step) == nullptr) throw std::invalid_argument("program: a convolution is missing");
  return *std::get<0>(step);
}

// Convolutions one behind the other, strip by strip. Residuals are one image, the same for all.
class ConvSequence {
 public:
  ConvSequence(const std::vector<Step>& steps, int threads) : sequence_(of(steps), threads) {
    for (const auto& [plan, activation, residual_first] : steps)
      steps_.push_back({*plan, activation, residual_first});
  }

  Four in_shape() const { return steps_.front().plan.in_shape(); }
  Four out_shape() const { return steps_.back().plan.out_shape(); }

  // Begins to read what is given at `first`.
  void run(uintptr_t x, uintptr_t out, const std::vector<Given>& given, size_t first) const {
    const Floats result = steps_.back().plan.output(out);
    steps_.front().plan.check_input(x, result);
    std::vector<SequenceOperands> operands;
    for (size_t i = 0; i < steps_.size(); ++i) {
      const auto [packed, bias, scale, shift, residual] = given.at(first + i);
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
    for (const Step& step : steps) result.push_back(plan_of(step).step());
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

// Lines of convolutions; each line reads the input or what a line before it gave, and adds a constant or such
// a map.
class ConvProgram {
 public:
  // Convolutions that go strip by strip, or one; the map that is read, and the one that is added: 0 is the
  // input, i what line i - 1 gave, -1 none.
  using Line = std::tuple<std::vector<Step>, int, int>;

  ConvProgram(const std::vector<Line>& lines, int threads) : threads_(threads) {
    if (lines.empty()) throw std::invalid_argument("program: there is no line in it");
    for (const auto& [steps, source, added] : lines) {
      if (steps.empty()) throw std::invalid_argument("program: a line has no convolution");
      if (source < 0 || source > count() || added > count())
        throw std::invalid_argument("program: line " + std::to_string(count()) +
                                    " reads what is not there yet");
      if (steps.size() != 1 && added >= 0)
        throw std::invalid_argument("program: a map is added to one convolution, not to strips of several");
      auto sequence = steps.size() == 1 ? nullptr : std::make_shared<ConvSequence>(steps, threads);
      lines_.push_back({sequence, plan_of(steps.at(0)), std::get<1>(steps[0]), std::get<2>(steps[0]), source,
                        added, 0, steps.size()});
      check(lines_.back());
    }
    find_slots();
  }

  Four out_shape() const { return shape_of(count()); }
  // Elements of the memory that maps between take turns in.
  const std::vector<int64_t>& slots() const { return slots_; }
  size_t convolutions() const {
    size_t sum = 0;
    for (const Known& line : lines_) sum += line.convolutions;
    return sum;
  }

  void run(uintptr_t x, uintptr_t out, const std::vector<uintptr_t>& slots,
           const std::vector<Given>& given) const {
    if (slots.size() != slots_.size() || given.size() != convolutions())
      throw std::invalid_argument("program: got " + std::to_string(slots.size()) + " slots and operands of " +
                                  std::to_string(given.size()) + " convolutions, need " +
                                  std::to_string(slots_.size()) + " and " + std::to_string(convolutions()));
    std::vector<uintptr_t> maps{x};
    size_t next = 0;
    for (const Known& line : lines_) {
      maps.push_back(maps.size() == lines_.size() ? out : slots[line.slot]);
      const auto& [packed, bias, scale, shift, constant] = given[next];
      if (line.sequence)
        line.sequence->run(maps[line.source], maps.back(), given, next);
      else
        line.plan.run(maps[line.source], packed, maps.back(), bias, scale, shift,
                      line.added < 0 ? constant : maps[line.added], line.added < 0, line.activation,
                      line.residual_first, threads_);
      next += line.convolutions;
    }
  }

 private:
  struct Known {
    std::shared_ptr<ConvSequence> sequence;
    ConvPlan plan;
    int activation;
    bool residual_first;
    int source, added;
    size_t slot;
    size_t convolutions;
    Four in_shape() const { return sequence ? sequence->in_shape() : plan.in_shape(); }
    Four out_shape() const { return sequence ? sequence->out_shape() : plan.out_shape(); }
  };

  int count() const { return static_cast<int>(lines_.size()); }
  Four shape_of(int map) const { return map == 0 ? lines_[0].in_shape() : lines_[map - 1].out_shape(); }

  void check(const Known& line) const {
    if (shape_of(line.source) != line.in_shape() ||
        (line.added >= 0 && shape_of(line.added) != line.out_shape()))
      throw std::invalid_argument("program: line " + std::to_string(count() - 1) +
                                  " does not fit what it reads");
  }

  // A slot for each map but the last: the first that no later line reads any more.
  void find_slots() {
    std::vector<int> last(lines_.size() + 1);  // line that reads a map last
    for (int i = 0; i < count(); ++i) {
      last[lines_[i].source] = i;
      if (lines_[i].added >= 0) last[lines_[i].added] = i;
    }
    std::vector<int> held;  // by each slot: the map
    for (int i = 0; i + 1 < count(); ++i) {
      size_t slot = 0;
      while (slot < held.size() && last[held[slot]] >= i) ++slot;
      if (slot == held.size()) {
        held.push_back(0);
        slots_.push_back(0);
      }
      const auto [n, h, w, k] = lines_[i].out_shape();
      held[slot] = i + 1;
      lines_[i].slot = slot;
      slots_[slot] = std::max(slots_[slot], n * h * w * k);
    }
  }

  std::vector<Known> lines_;
  std::vector<int64_t> slots_;
  int threads_;
};

}  // namespace

void bind_program(py::module_& module) {
  py::class_<ConvProgram>(module, "ConvProgram", "Convolutions that one call runs, one line after the other.")
      .def(py::init<const std::vector<ConvProgram::Line>&, int>(), py::arg("lines"), py::arg("threads"))
      .def_property_readonly("out_shape", &ConvProgram::out_shape)
      .def_property_readonly("slots", &ConvProgram::slots)
      .def(
          "run", &ConvProgram::run, py::arg("x"), py::arg("out"), py::arg("slots"), py::arg("operands"),
          "Run on float32 arrays at these addresses: input, output, memory of the slots, and (packed weight, "
          "bias, scale, shift, residual) of each convolution, 0 for none.");
}

}  // namespace updp

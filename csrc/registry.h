// The table of kernels at run time: csrc/kernels.def, with what this build holds and this CPU can run.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace updp {

struct Kernel {
  std::string_view op;
  std::string_view algorithm;
  std::string_view dtype;
  std::string_view isa;
  void (*function)();  // nullptr where the build leaves it out (x86 kernels on another architecture)

  std::string name() const;  // op_algorithm_dtype_isa
  bool available() const;    // built, and this CPU has the instruction set
  int64_t lanes() const;     // floats in a vector of the instruction set
};

struct CpuFeature {
  std::string_view name;
  bool present;
};

std::span<const Kernel> kernels();

// The kernel of that name; throws std::invalid_argument for an unknown one or one that cannot run here.
const Kernel& find_kernel(std::string_view op, std::string_view name);

// The CPU features that dispatch asks for, as the CPU and the operating system report them.
std::span<const CpuFeature> cpu_features();

}  // namespace updp

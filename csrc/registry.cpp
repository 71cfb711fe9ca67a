#include "registry.h"

#include <algorithm>
#include <stdexcept>

#include "attention.h"
#include "conv.h"
#include "dwcompose.h"
#include "layer_norm.h"

namespace updp {

// Declarations, one per row.
#define UPDP_TYPE_f32 float
#define UPDP_TYPE_f64 double
#define UPDP_DECLARE_dwcompose(name, T) void name(const DwComposeJob<T>&, int64_t, int64_t, T*);
#define UPDP_DECLARE_conv(name, T) void name(const ConvJob&, int64_t, int, int64_t, int64_t, T*);
#define UPDP_DECLARE_attention(name, T) void name(const AttentionJob&, int64_t, int64_t, T*);
#define UPDP_DECLARE_layer_norm(name, T) void name(const LayerNormJob&, int64_t, int64_t);
#define UPDP_KERNEL(op, algorithm, dtype, isa) \
  UPDP_DECLARE_##op(op##_##algorithm##_##dtype##_##isa, UPDP_TYPE_##dtype)
#include "kernels.def"
#undef UPDP_KERNEL

namespace {

// Function pointers, or nullptr where this build leaves an instruction set out.
#define UPDP_ALWAYS(name) reinterpret_cast<void (*)()>(&name)
#if UPDP_X86
#define UPDP_ON_X86(name) UPDP_ALWAYS(name)
#else
#define UPDP_ON_X86(name) nullptr
#endif
#define UPDP_POINTER_portable(name) UPDP_ALWAYS(name)
#define UPDP_POINTER_avx2(name) UPDP_ON_X86(name)
#define UPDP_POINTER_avx512(name) UPDP_ON_X86(name)

const Kernel kKernels[] = {
#define UPDP_KERNEL(op, algorithm, dtype, isa) \
  {#op, #algorithm, #dtype, #isa, UPDP_POINTER_##isa(op##_##algorithm##_##dtype##_##isa)},
#include "kernels.def"
#undef UPDP_KERNEL
};

bool has(std::string_view feature) {
  const auto features = cpu_features();
  const auto found = std::ranges::find(features, feature, &CpuFeature::name);
  return found != features.end() && found->present;
}

// The features that the compiler flags of an instruction set allow it to use (CMakeLists.txt names the
// flags).
bool cpu_runs(std::string_view isa) {
  if (isa == "avx512") return has("avx512f") && has("avx512dq") && has("avx512bw") && has("avx512vl");
  if (isa == "avx2") return has("avx2") && has("fma");
  return isa == "portable";
}

}  // namespace

std::string Kernel::name() const {
  std::string text;
  for (std::string_view part : {op, algorithm, dtype, isa}) text.append(text.empty() ? "" : "_").append(part);
  return text;
}

bool Kernel::available() const { return function != nullptr && cpu_runs(isa); }

int64_t Kernel::lanes() const { return isa == "avx512" ? 16 : isa == "avx2" ? 8 : 4; }

std::span<const Kernel> kernels() { return kKernels; }

const Kernel& find_kernel(std::string_view op, std::string_view name) {
  for (const Kernel& kernel : kKernels) {
    if (kernel.op != op || kernel.name() != name) continue;
    if (!kernel.available())
      throw std::invalid_argument(kernel.name() + " cannot run on this CPU or is not built");
    return kernel;
  }
  throw std::invalid_argument("there is no kernel '" + std::string(name) + "' of " + std::string(op));
}

std::span<const CpuFeature> cpu_features() {
#if UPDP_X86
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  static const CpuFeature features[] = {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"avx512f", __builtin_cpu_supports("avx512f") != 0},
      {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
  };
  return features;
#else
  return {};
#endif
}

}  // namespace updp

// dwcompose_lanes: channels in vector lanes. Compiled once per instruction set, with that set's flags.
//
// Nothing in this file may have external linkage but the kernels themselves, and no standard-library
// templates or inline functions may be called: the linker keeps one copy of those for the whole module, and
// it could keep the copy that was compiled with flags this CPU does not have. -ffp-contract=off keeps the
// bits equal between instruction sets.
#include "dwcompose.h"

#define UPDP_PASTE4(a, b, c, d) a##_##b##_##c##_##d
#define UPDP_NAME(op, algorithm, dtype, isa) UPDP_PASTE4(op, algorithm, dtype, isa)

namespace updp {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectors = kLaneBytes / kVectorBytes;

template <typename T>
struct Lanes {
  static constexpr int kCount = kLaneBytes / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
};

// (lanes, taps) -> (taps, lanes); missing lanes are zero.
template <typename T>
inline void load_transposed(const T* from, int64_t taps, int lanes, T* to) {
  constexpr int kCount = Lanes<T>::kCount;
  for (int lane = 0; lane < lanes; ++lane)
    for (int64_t tap = 0; tap < taps; ++tap) to[tap * kCount + lane] = from[lane * taps + tap];
  for (int lane = lanes; lane < kCount; ++lane)
    for (int64_t tap = 0; tap < taps; ++tap) to[tap * kCount + lane] = T{0};
}

// One tap of the result, for all lanes.
template <typename T>
inline void sum_pairs(const DwComposeJob<T>& job, int32_t y, int32_t x, const T* outer, const T* inner,
                      T* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kCount = Lanes<T>::kCount;
  Vector sum[kVectors] = {};
  for (int32_t i = job.h.first[y]; i < job.h.first[y + 1]; ++i) {
    const T* outer_row = outer + int64_t{job.h.pairs[i].outer} * job.w.outer_size * kCount;
    const T* inner_row = inner + int64_t{job.h.pairs[i].inner} * job.w.inner_size * kCount;
    for (int32_t j = job.w.first[x]; j < job.w.first[x + 1]; ++j) {
      const auto* a = reinterpret_cast<const Vector*>(outer_row + job.w.pairs[j].outer * kCount);
      const auto* b = reinterpret_cast<const Vector*>(inner_row + job.w.pairs[j].inner * kCount);
      for (int v = 0; v < kVectors; ++v) sum[v] += a[v] * b[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(out)[v] = sum[v];
}

template <typename T>
inline void compose(const DwComposeJob<T>& job, int64_t begin, int64_t end, T* scratch) {
  constexpr int kCount = Lanes<T>::kCount;
  const int64_t outer_taps = int64_t{job.h.outer_size} * job.w.outer_size;
  const int64_t inner_taps = int64_t{job.h.inner_size} * job.w.inner_size;
  const int64_t out_taps = int64_t{job.h.out_size} * job.w.out_size;
  T* outer = scratch;
  T* inner = outer + outer_taps * kCount;
  T* out = inner + inner_taps * kCount;
  for (int64_t channel = begin; channel < end; channel += kCount) {
    const int lanes = static_cast<int>(end - channel < kCount ? end - channel : kCount);
    load_transposed(job.outer + channel * outer_taps, outer_taps, lanes, outer);
    load_transposed(job.inner + channel * inner_taps, inner_taps, lanes, inner);
    T* tap = out;
    for (int32_t y = 0; y < job.h.out_size; ++y)
      for (int32_t x = 0; x < job.w.out_size; ++x, tap += kCount) sum_pairs(job, y, x, outer, inner, tap);
    T* to = job.out + channel * out_taps;
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t o = 0; o < out_taps; ++o) *to++ = out[o * kCount + lane];
  }
}

}  // namespace

void UPDP_NAME(dwcompose, lanes, f64, UPDP_ISA)(const DwComposeJob<double>& job, int64_t begin, int64_t end,
                                                double* scratch) {
  compose(job, begin, end, scratch);
}

void UPDP_NAME(dwcompose, lanes, f32, UPDP_ISA)(const DwComposeJob<float>& job, int64_t begin, int64_t end,
                                                float* scratch) {
  compose(job, begin, end, scratch);
}

}  // namespace updp

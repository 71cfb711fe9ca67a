#include "dwcompose.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace updp {
namespace {

// Below this many products for a thread, starting it costs more than it brings (some 50 us of work).
constexpr int64_t kProductsPerThread = int64_t{1} << 18;

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw std::invalid_argument("dwcompose: sizes overflow");
  return result;
}

int64_t sum(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_add_overflow(a, b, &result)) throw std::invalid_argument("dwcompose: sizes overflow");
  return result;
}

void require_positive(const char* what, const int64_t values[2]) {
  for (int axis = 0; axis < 2; ++axis) {
    if (values[axis] < 1)
      throw std::invalid_argument(std::string("dwcompose: ") + what + " is " + std::to_string(values[axis]) +
                                  ", need at least 1");
  }
}

// Where taps land on one axis: inner tap a and outer tap b meet at a * inner_step + b * outer_step.
struct Steps {
  int64_t inner;
  int64_t outer;
  int64_t out_size;
};

Steps steps_of(const DwComposeGeometry& g, int axis) {
  const int64_t inner = g.inner_size[axis] > 1 ? g.inner_dilation[axis] : 0;
  const int64_t outer = g.outer_size[axis] > 1 ? product(g.inner_stride[axis], g.outer_dilation[axis]) : 0;
  const int64_t grid = std::max<int64_t>(std::gcd(inner, outer), 1);
  const int64_t last =
      sum(product(g.inner_size[axis] - 1, inner), product(g.outer_size[axis] - 1, outer)) / grid;
  if (last >= std::numeric_limits<int32_t>::max()) throw std::invalid_argument("dwcompose: sizes overflow");
  return {inner / grid, outer / grid, last + 1};
}

// The pairs of one axis, sorted by the tap they meet at (a counting sort, stable in the outer tap).
struct Axis {
  std::vector<int32_t> first;
  std::vector<TapPair> pairs;
  AxisView view;

  Axis(const DwComposeGeometry& g, int axis) {
    const Steps steps = steps_of(g, axis);
    const auto outer_size = static_cast<int32_t>(g.outer_size[axis]);
    const auto inner_size = static_cast<int32_t>(g.inner_size[axis]);
    const auto tap = [&](int32_t outer, int32_t inner) { return outer * steps.outer + inner * steps.inner; };
    first.assign(steps.out_size + 1, 0);
    for (int32_t outer = 0; outer < outer_size; ++outer)
      for (int32_t inner = 0; inner < inner_size; ++inner) ++first[tap(outer, inner) + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    pairs.resize(first.back());
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (int32_t outer = 0; outer < outer_size; ++outer)
      for (int32_t inner = 0; inner < inner_size; ++inner) pairs[next[tap(outer, inner)]++] = {outer, inner};
    view = {outer_size, inner_size, static_cast<int32_t>(steps.out_size), first.data(), pairs.data()};
  }
};

template <typename T>
struct AlignedDelete {
  void operator()(T* pointer) const { ::operator delete[](pointer, std::align_val_t{kLaneBytes}); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete<T>>;

template <typename T>
AlignedArray<T> allocate(int64_t elements) {
  return AlignedArray<T>(static_cast<T*>(
      ::operator new[](static_cast<size_t>(product(elements, sizeof(T))), std::align_val_t{kLaneBytes})));
}

}  // namespace

void dwcompose_out_size(const DwComposeGeometry& g, int64_t out_size[2]) {
  require_positive("the outer kernel size", g.outer_size);
  require_positive("the inner kernel size", g.inner_size);
  require_positive("the inner stride", g.inner_stride);
  require_positive("the inner dilation", g.inner_dilation);
  require_positive("the outer dilation", g.outer_dilation);
  for (int axis = 0; axis < 2; ++axis) out_size[axis] = steps_of(g, axis).out_size;
  // Kernels index bytes of all weights, and their scratch, with 64 bits; products of pairs of taps with 32.
  product(product(out_size[0], out_size[1]),
          std::max<int64_t>(g.channels, kLaneBytes) * int64_t{sizeof(double)});
  for (int axis = 0; axis < 2; ++axis) {
    if (product(g.outer_size[axis], g.inner_size[axis]) > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("dwcompose: sizes overflow");
  }
}

template <typename T>
void dwcompose(DwComposeKernel<T> kernel, const DwComposeGeometry& geometry, const T* outer, const T* inner,
               T* out, int threads) {
  const Axis h(geometry, 0), w(geometry, 1);
  const DwComposeJob<T> job{outer, inner, out, h.view, w.view};
  const int64_t lanes = kLaneBytes / static_cast<int64_t>(sizeof(T));
  const int64_t groups = (geometry.channels + lanes - 1) / lanes;
  const double products = static_cast<double>(geometry.channels) * h.pairs.size() * w.pairs.size();
  const int64_t useful = std::min<int64_t>(groups, static_cast<int64_t>(products / kProductsPerThread));
  const int64_t workers = std::clamp<int64_t>(useful, 1, std::max(threads, 1));
  // Each thread's scratch begins on its own cache lines.
  const int64_t scratch_size = dwcompose_scratch(job);
  const auto scratch = allocate<T>(product(scratch_size, workers));
#pragma omp parallel for num_threads(static_cast<int>(workers)) schedule(static, 1) if (workers > 1)
  for (int64_t worker = 0; worker < workers; ++worker) {
    const int64_t begin = groups * worker / workers * lanes;
    const int64_t end = std::min(groups * (worker + 1) / workers * lanes, geometry.channels);
    kernel(job, begin, end, scratch.get() + worker * scratch_size);
  }
}

template void dwcompose<float>(DwComposeKernel<float>, const DwComposeGeometry&, const float*, const float*,
                               float*, int);
template void dwcompose<double>(DwComposeKernel<double>, const DwComposeGeometry&, const double*,
                                const double*, double*, int);

}  // namespace updp

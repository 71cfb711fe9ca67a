// layer_norm_rows: a row after the other, read three times from the first cache. Compiled once per
// instruction set; see conv_vector.h for the rule about linkage.
#include "layer_norm.h"
#include "vector_math.h"

namespace updp {
namespace {

constexpr int kSums = 4;  // that do not wait for each other

// The lanes with numbers below `count`, and zeros in the others.
inline Vec first_or_zero(Vec x, int64_t count) {
  const IntVec limit = static_cast<int32_t>(count) - IntVec{};
  return lane_numbers(Lanes{}) < limit ? x : Vec{};
}

inline Vec total(const Vec (&sums)[kSums]) { return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// The mean, but for rounding.
inline Vec mean_of(const float* x, int64_t channels) {
  Vec sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= channels; c += kSums * kLanes) {
    UPDP_UNROLL for (int i = 0; i < kSums; ++i) { sums[i] += load(x + c + i * kLanes); }
  }
  for (; c + kLanes <= channels; c += kLanes) sums[0] += load(x + c);
  if (c < channels) sums[1] += load_first(x + c, channels - c);
  return total(sums) / static_cast<float>(channels);
}

struct Moments {
  Vec rest;  // what the mean was too small by
  Vec variance;
};

// Differences from a mean that is nearly right are nearly exact, and so is what follows from them, however
// large the mean is.
inline Moments moments_of(const float* x, int64_t channels, Vec mean) {
  Vec sums[kSums] = {}, squares[kSums] = {};
  const auto take = [&](int i, Vec difference) {
    sums[i] += difference;
    squares[i] += difference * difference;
  };
  int64_t c = 0;
  for (; c + kSums * kLanes <= channels; c += kSums * kLanes) {
    UPDP_UNROLL for (int i = 0; i < kSums; ++i) { take(i, load(x + c + i * kLanes) - mean); }
  }
  for (; c + kLanes <= channels; c += kLanes) take(0, load(x + c) - mean);
  if (c < channels) take(1, first_or_zero(load_first(x + c, channels - c) - mean, channels - c));
  const float count = static_cast<float>(channels);
  const Vec rest = total(sums) / count;
  return {rest, at_least(total(squares) / count - rest * rest, 0.0f)};
}

template <bool kWeight, bool kBias>
void normalize(const LayerNormJob& job, int64_t begin, int64_t end) {
  const int64_t channels = job.channels;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = job.x + row * channels;
    float* out = job.out + row * channels;
    const Vec mean = mean_of(x, channels);
    const Moments moments = moments_of(x, channels, mean);
    const Vec factor = splat(1.0f / __builtin_sqrtf(moments.variance[0] + job.eps));
    const Vec offset = -moments.rest * factor;
    const auto put = [&](int64_t c, int64_t count) {
      Vec y = (load_some(x + c, count) - mean) * factor + offset;
      if constexpr (kWeight) y *= load_some(job.weight + c, count);
      if constexpr (kBias) y += load_some(job.bias + c, count);
      store_some(out + c, y, count);
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) put(c, kLanes);
    if (c < channels) put(c, channels - c);
  }
}

}  // namespace

void UPDP_NAME(layer_norm, rows, f32, UPDP_ISA)(const LayerNormJob& job, int64_t begin, int64_t end) {
  if (job.weight)
    job.bias ? normalize<true, true>(job, begin, end) : normalize<true, false>(job, begin, end);
  else
    job.bias ? normalize<false, true>(job, begin, end) : normalize<false, false>(job, begin, end);
}

}  // namespace updp

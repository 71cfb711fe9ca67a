// The epilogue: bias, activation, per-channel affine and residual, on a tile of sums on its way to the
// output. Only kernel files include it.
#pragma once

#include "conv.h"
#include "conv_vector.h"
#include "vector_math.h"

namespace updp {
namespace {

// The exact one, x (1 + erf(x / sqrt 2)) / 2, by a least-maximum fit: the normal distribution's tail beyond
// |x| is 2^-Q(|x|), to 1e-8.
inline Vec gelu(Vec x) {
  const Vec size = at_most(x < 0.0f ? -x : x, 9.0f);
  Vec q = splat(2.77204845e-6f);
  q = q * size - 3.86207394e-5f;
  q = q * size + 1.82547563e-4f;
  q = q * size + 1.45870203e-4f;
  q = q * size - 7.07547180e-3f;
  q = q * size + 5.25050275e-2f;
  q = q * size + 4.59204912e-1f;
  q = q * size + 1.15110576f;
  q = q * size + 1.0f;
  const Vec tail = x * power_of_two(-q);
  return x < 0.0f ? tail : x - tail;
}

inline Vec silu(Vec x) {
  const Vec power = at_least(at_most(x * -1.44269504f, 126.0f), -126.0f);
  return x / (1.0f + power_of_two(power));
}

template <Activation kActivation>
inline Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kRelu) return at_least(x, 0.0f);
  if constexpr (kActivation == Activation::kRelu6) return at_most(at_least(x, 0.0f), 6.0f);
  if constexpr (kActivation == Activation::kGelu) return gelu(x);
  if constexpr (kActivation == Activation::kSilu) return silu(x);
  if constexpr (kActivation == Activation::kHardswish)
    return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
  return x;
}

// A tile of ny x nx pixels of sums, and where its pixels go.
struct Tile {
  const float* sums;
  int64_t sums_down, sums_across;  // steps in elements
  int64_t ny, nx;
  int64_t at;  // of its first element, in out and in residual
  int64_t down, across;
  int64_t column;  // the first output channel
  int64_t columns;
};

template <Activation kActivation>
inline Vec finish_vector(Vec sum, const ConvEpilogue& e, const Vec (&channel)[3], int64_t at, int64_t count) {
  Vec residual = {};
  if (e.residual)
    residual = load_some(e.residual + (at < e.residual_period ? at : at % e.residual_period), count);
  sum += channel[0];
  if (e.residual_first) sum += residual;
  sum = activate<kActivation>(sum);
  if (e.scale) sum = sum * channel[1] + channel[2];
  return e.residual_first ? sum : sum + residual;
}

template <Activation kActivation>
void finish(const ConvJob& job, const Tile& tile) {
  const ConvEpilogue& e = job.epilogue;
  for (int64_t v = 0; v < tile.columns; v += kLanes) {
    const int64_t count = least(tile.columns - v, kLanes), column = tile.column + v;
    const Vec channel[3] = {e.bias ? load_some(e.bias + column, count) : Vec{},
                            e.scale ? load_some(e.scale + column, count) : Vec{},
                            e.scale ? load_some(e.shift + column, count) : Vec{}};
    for (int64_t y = 0; y < tile.ny; ++y) {
      const float* sums = tile.sums + y * tile.sums_down + v;
      int64_t at = tile.at + y * tile.down + v;
      for (int64_t x = 0; x < tile.nx; ++x, sums += tile.sums_across, at += tile.across) {
        const Vec value = finish_vector<kActivation>(load(sums), e, channel, at, count);
        store_some(job.out + at, value, count);
      }
    }
  }
}

using Finish = void (*)(const ConvJob& job, const Tile& tile);
constexpr Finish kFinish[kActivations] = {finish<Activation::kNone>,  finish<Activation::kRelu>,
                                          finish<Activation::kRelu6>, finish<Activation::kGelu>,
                                          finish<Activation::kSilu>,  finish<Activation::kHardswish>};

inline Finish finish_of(const ConvJob& job) { return kFinish[static_cast<int>(job.epilogue.activation)]; }

}  // namespace
}  // namespace updp

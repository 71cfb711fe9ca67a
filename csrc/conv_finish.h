// The epilogue: bias, activation, per-channel affine and residual, on a tile of sums on its way to the
// output. Only kernel files include it.
#pragma once

#include "conv.h"
#include "conv_vector.h"

namespace updp {
namespace {

// e^x to an ulp or two; x is held to where 2^n is a normal number.
inline Vec exponential(Vec x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = at_least(at_most(x, 88.0f), -87.0f);
  const Vec n = (x * 1.44269504f + kMagic) - kMagic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec p = splat(0.0013836834f);
  p = p * r + 0.0083748223f;
  p = p * r + 0.0416682251f;
  p = p * r + 0.1666641980f;
  p = p * r + 0.4999999106f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * reinterpret_cast<Vec>(bits);
}

// erf(z): z P(z^2) up to 1, 1 - e^-Q(z) beyond; both polynomials are least-maximum fits, good to 2e-9.
inline Vec error_function(Vec z) {
  const Vec size = z < 0.0f ? -z : z;
  const Vec s = z * z;
  Vec p = splat(7.8891193e-05f);
  p = p * s - 0.00080208411f;
  p = p * s + 0.00518953521f;
  p = p * s - 0.02685444430f;
  p = p * s + 0.11283600330f;
  p = p * s - 0.37612625957f;
  p = p * s + 1.12837910652f;
  const Vec t = at_most(size, 4.0f);
  Vec q = splat(-0.00018557490f);
  q = q * t + 0.00293961587f;
  q = q * t - 0.02180535160f;
  q = q * t + 0.10303743929f;
  q = q * t + 0.63822561502f;
  q = q * t + 1.12704002857f;
  q = q * t + 0.00035370892f;
  const Vec tail = 1.0f - exponential(-q);
  return size > 1.0f ? (z < 0.0f ? -tail : tail) : z * p;
}

template <Activation kActivation>
inline Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kRelu) return at_least(x, 0.0f);
  if constexpr (kActivation == Activation::kRelu6) return at_most(at_least(x, 0.0f), 6.0f);
  if constexpr (kActivation == Activation::kGelu) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
  if constexpr (kActivation == Activation::kSilu) return x / (1.0f + exponential(-x));
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
  if (e.residual) residual = load_some(e.residual + at, count);
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

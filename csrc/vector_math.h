// Functions of vectors of floats, and of their lanes. Only kernel files include it (see conv_vector.h).
#pragma once

#include <utility>

#include "conv_vector.h"

namespace updp {
namespace {

template <int... kLane>
constexpr IntVec lane_numbers(std::integer_sequence<int, kLane...>) {
  return IntVec{kLane...};
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// Each lane's neighbour at a distance of kStep, a power of two.
template <int kStep, int... kLane>
inline Vec swapped(Vec x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kStep)...);
}

// In every lane: the sum of all lanes.
template <int kStep = kLanes / 2>
inline Vec sum_of_lanes(Vec x) {
  if constexpr (kStep == 0)
    return x;
  else
    return sum_of_lanes<kStep / 2>(x + swapped<kStep>(x, Lanes{}));
}

// 2^x for -126 <= x <= 126, to an ulp or two; the polynomials here are least-maximum fits.
inline Vec power_of_two(Vec x) {
  constexpr float kMagic =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  const Vec shifted = x + kMagic, r = x - (shifted - kMagic);
  Vec p = splat(1.53457891e-4f);
  p = p * r + 1.33999367e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032863e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
}

}  // namespace
}  // namespace updp

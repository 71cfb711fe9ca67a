// Functions of vectors of floats. Only kernel files include it (see conv_vector.h).
#pragma once

#include "conv_vector.h"

namespace updp {
namespace {

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

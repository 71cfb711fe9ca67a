// Packing of weights: once, in float64 where there is arithmetic.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"

namespace updp {
namespace {

// The rows of Winograd's G: a row of the 3x3 weight, as a polynomial, at each interpolation point, over what
// the input's transform leaves out.
std::vector<std::array<double, 3>> weight_transform(int64_t tile) {
  if (tile == 2) return {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  const double p = kWinogradP, q = kWinogradQ, p2 = p * p, q2 = q * q;
  const auto at = [](double point, double divisor) {
    return std::array<double, 3>{1 / divisor, point / divisor, point * point / divisor};
  };
  const double by_p = 2 * p2 * (p2 - q2), by_q = 2 * q2 * (q2 - p2);
  return {at(0, p2 * q2), at(p, by_p), at(-p, by_p), at(q, by_q), at(-q, by_q), {0, 0, 1}};
}

// Calls visit(input of the block's matrix, column, channel of output) for every element of the packed
// columns, in order; columns beyond the last channel have channel -1.
template <typename Visit>
void for_columns(const ConvColumns& columns, int64_t depth, int64_t k, const Visit& visit) {
  int64_t at = 0;
  for (int64_t block = 0; block < columns.blocks; ++block) {
    const int64_t begin = block * columns.wide, width = std::min(columns.padded - begin, columns.wide);
    for (int64_t row = 0; row < depth; ++row)
      for (int64_t column = begin; column < begin + width; ++column)
        visit(at++, row, column < k ? column : -1);
  }
}

void pack_winograd(int64_t tile, const ConvColumns& columns, const ConvGeometry& g, const float* weight,
                   float* packed) {
  const auto transform = weight_transform(tile);
  const auto side = static_cast<int64_t>(transform.size());
  const int64_t point_size = columns.padded * g.c;
  for_columns(columns, g.c, g.k, [&](int64_t at, int64_t c, int64_t k) {
    const float* w = k < 0 ? nullptr : weight + (k * g.c + c) * 9;
    for (int64_t i = 0; i < side; ++i) {
      double row[3] = {};
      for (int64_t x = 0; x < 3 && w; ++x)
        for (int64_t y = 0; y < 3; ++y) row[x] += transform[i][y] * w[y * 3 + x];
      for (int64_t j = 0; j < side; ++j) {
        double sum = 0;
        for (int64_t x = 0; x < 3; ++x) sum += transform[j][x] * row[x];
        packed[(i * side + j) * point_size + at] = static_cast<float>(sum);
      }
    }
  });
}

// Of each vector of channels all taps; the last vector ends with the last channel.
void pack_depthwise(const ConvColumns& columns, const ConvGeometry& g, const float* weight, float* packed) {
  const int64_t taps = g.kh * g.kw;
  for (int64_t first = 0; first < columns.padded; first += columns.lanes)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t lane = 0; lane < columns.lanes; ++lane) {
        const int64_t k = std::max<int64_t>(std::min(first, g.k - columns.lanes), 0) + lane;
        *packed++ = k < g.k ? weight[k * taps + tap] : 0.0f;
      }
}

}  // namespace

bool conv_is_depthwise(std::string_view algorithm) { return algorithm == "depthwise"; }

int64_t conv_depth(const ConvGeometry& g) { return g.c / g.groups * g.kh * g.kw; }

int64_t conv_tile(std::string_view algorithm) {
  return algorithm == "winograd4" ? 4 : algorithm == "winograd2" ? 2 : 0;
}

ConvColumns conv_columns(int64_t k, int64_t lanes) {
  const int64_t wide = 2 * lanes;
  return {lanes, wide, (k + wide - 1) / wide, (k + lanes - 1) / lanes * lanes};
}

int64_t conv_packed_size(std::string_view algorithm, int64_t lanes, const ConvGeometry& g) {
  const int64_t tile = conv_tile(algorithm);
  if (tile && (g.kh != 3 || g.kw != 3))
    throw std::invalid_argument("conv: " + std::string(algorithm) + " is for 3x3 weights, got " +
                                std::to_string(g.kh) + "x" + std::to_string(g.kw));
  return conv_columns(g.k, lanes).padded * (tile ? g.c * (tile + 2) * (tile + 2) : conv_depth(g));
}

void conv_pack(std::string_view algorithm, int64_t lanes, const ConvGeometry& g, const float* weight,
               float* packed) {
  const ConvColumns columns = conv_columns(g.k, lanes);
  if (const int64_t tile = conv_tile(algorithm)) return pack_winograd(tile, columns, g, weight, packed);
  if (conv_is_depthwise(algorithm)) return pack_depthwise(columns, g, weight, packed);
  const int64_t taps = g.kh * g.kw;
  for_columns(columns, taps * g.c, g.k, [&](int64_t at, int64_t row, int64_t k) {
    packed[at] = k < 0 ? 0.0f : weight[(k * g.c + row % g.c) * taps + row / g.c];
  });
}

}  // namespace updp

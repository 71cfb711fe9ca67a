// The register tile that all convolutions end in: a few rows of inputs times a block of packed columns. Only
// kernel files include it.
#pragma once

#include "conv.h"
#include "conv_vector.h"

namespace updp {
namespace {

// Rows of inputs: row i, element k of segment s is at a[i * row + s * segment + k]. The k of all segments,
// one after the other, meet the rows of the packed columns.
struct Rows {
  const float* a;
  int64_t row;
  int64_t length;  // of a segment
  int64_t segments;
  int64_t segment;  // step from one to the next
};

// The epilogues that cost nothing where the sums are still in registers: a bias and bounds.
struct Bounds {
  const float* bias;  // or null
  float low, high;
  float* out;
  int64_t step;     // from a row to the next
  int64_t columns;  // that exist
};

// True if the epilogue is no more than a bias and bounds.
inline bool bounds_of(const ConvJob& job, int64_t column, int64_t at, Bounds& bounds) {
  const ConvEpilogue& e = job.epilogue;
  const float infinity = __builtin_inff();
  const bool is_relu6 = e.activation == Activation::kRelu6;
  bounds = {e.bias ? e.bias + column : nullptr,
            e.activation == Activation::kNone ? -infinity : 0.0f,
            is_relu6 ? 6.0f : infinity,
            job.out + at,
            job.g.k,
            job.g.k - column};
  const bool is_bounding = e.activation == Activation::kNone || e.activation == Activation::kRelu || is_relu6;
  return is_bounding && !e.scale && !e.residual;
}

template <int kCount, int kVectors>
inline void store_bounded(const Vec (&total)[kCount][kVectors], const Bounds& to) {
  UPDP_UNROLL for (int v = 0; v < kVectors; ++v) {
    const int64_t column = v * kLanes, count = least(to.columns - column, kLanes);
    if (count <= 0) return;
    const Vec bias = to.bias ? load_some(to.bias + column, count) : Vec{};
    UPDP_UNROLL for (int i = 0; i < kCount; ++i) {
      const Vec value = at_most(at_least(total[i][v] + bias, to.low), to.high);
      store_some(to.out + i * to.step + column, value, count);
    }
  }
}

// What will be read next, asked for line by line while the product runs: weights come from far away.
struct Ahead {
  const float* at;
  int64_t step;  // elements, each time the product goes one k further
};

// total[i][column] = (add ? sums[i * step + column] : 0) + rows[i] . b[column], in the order of k; what comes
// out goes to sums again, or, with bounds, finished to the output.
template <int kCount, int kVectors>
void multiply(const Rows& rows, const float* b, float* sums, int64_t step, bool add, const Bounds* bounds,
              Ahead ahead) {
  Vec total[kCount][kVectors] = {};
  // One pointer for three rows: their addresses are the pointer plus 0, 1 or 2 times the row.
  constexpr int kPointers = (kCount + 2) / 3;
  for (int64_t s = 0; s < rows.segments; ++s) {
    const float* at[kPointers];
    UPDP_UNROLL for (int p = 0; p < kPointers; ++p) at[p] = rows.a + s * rows.segment + 3 * p * rows.row;
    for (int64_t k = 0; k < rows.length; ++k) {
      UPDP_UNROLL for (int v = 0; v < kVectors; ++v) __builtin_prefetch(ahead.at + 16 * v, 0, 2);
      ahead.at += ahead.step;
      Vec column[kVectors];
      UPDP_UNROLL for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kLanes);
      UPDP_UNROLL for (int i = 0; i < kCount; ++i) {
        const float value = at[i / 3][(i % 3) * rows.row];
        UPDP_UNROLL for (int v = 0; v < kVectors; ++v) total[i][v] += value * column[v];
      }
      UPDP_UNROLL for (int p = 0; p < kPointers; ++p)++ at[p];
      b += kVectors * kLanes;
    }
  }
  if (add) {
    UPDP_UNROLL for (int i = 0; i < kCount; ++i) {
      UPDP_UNROLL for (int v = 0; v < kVectors; ++v) total[i][v] += load(sums + i * step + v * kLanes);
    }
  }
  if (bounds) return store_bounded(total, *bounds);
  UPDP_UNROLL for (int i = 0; i < kCount; ++i) {
    UPDP_UNROLL for (int v = 0; v < kVectors; ++v) store(sums + i * step + v * kLanes, total[i][v]);
  }
}

using Multiply = void (*)(const Rows& rows, const float* b, float* sums, int64_t step, bool add,
                          const Bounds* bounds, Ahead ahead);

template <int kVectors, int... kCounts>
struct Multiplies {
  static constexpr Multiply kTable[] = {nullptr, multiply<kCounts, kVectors>...};
};

#if defined(__AVX512F__)
#define UPDP_COUNTS 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14
#elif defined(__AVX2__)
#define UPDP_COUNTS 1, 2, 3, 4, 5, 6
#else
#define UPDP_COUNTS 1, 2, 3, 4, 5
#endif

// For `count` rows (1 to kRows) and a block of `width` columns.
inline Multiply multiply_of(int64_t count, int64_t width) {
  return (width == kWide ? Multiplies<2, UPDP_COUNTS>::kTable : Multiplies<1, UPDP_COUNTS>::kTable)[count];
}

// The columns of a block, and where the block begins in a packed matrix of `depth` rows.
inline int64_t block_width(const ConvColumns& columns, int64_t block) {
  return least(columns.padded - block * columns.wide, columns.wide);
}
inline const float* block_weight(const ConvColumns& columns, const float* packed, int64_t block,
                                 int64_t depth) {
  return packed + block * columns.wide * depth;
}

}  // namespace
}  // namespace updp

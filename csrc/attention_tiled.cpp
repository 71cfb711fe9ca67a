// attention_tiled: two matrix products with a softmax between them, a few queries at a time, so that their
// scores stay in the cache. Compiled once per instruction set; see conv_vector.h for the rule about linkage.
#include "attention.h"
#include "conv_multiply.h"
#include "vector_math.h"

namespace updp {
namespace {

// The sum is taken in parts of so many products: see conv_direct.cpp.
constexpr int64_t kPart = 256;
constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_inff();

// The lanes with numbers below `count`, and -inf in the others.
inline Vec first_or_nothing(Vec x, int64_t count) {
  const IntVec limit = static_cast<int32_t>(count) - IntVec{};
  return lane_numbers(Lanes{}) < limit ? x : splat(-kInfinity);
}

// In every lane: the largest of all lanes.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
template <int kStep = kLanes / 2>
inline Vec largest_of_lanes(Vec x) {
  if constexpr (kStep == 0)
    return x;
  else
    return largest_of_lanes<kStep / 2>(larger(x, swapped<kStep>(x, Lanes{})));
}

// Exchanges blocks of kSize lanes beside the diagonal, for all sizes: rows become columns.
template <int kSize, int... kLane>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec low = __builtin_shufflevector(a, b, (kLane & kSize ? kLanes + kLane - kSize : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kSize ? kLanes + kLane : kLane + kSize)...);
  a = low;
}
template <int kSize = 1>
inline void transpose(Vec (&rows)[kLanes]) {
  UPDP_UNROLL for (int i = 0; i < kLanes; ++i) {
    if (!(i & kSize)) exchange<kSize>(rows[i], rows[i + kSize], Lanes{});
  }
  if constexpr (2 * kSize < kLanes) transpose<2 * kSize>(rows);
}

// The keys of a head as columns: [block][channel][key of the block], zeros where there is no key.
void pack_keys(const AttentionJob& job, const float* k, float* packed) {
  const int64_t depth = job.g.depth, token = job.k_strides.token;
  for (int64_t block = 0; block < job.layout.keys.blocks; ++block) {
    const int64_t width = block_width(job.layout.keys, block);
    for (int64_t v = 0; v < width; v += kLanes) {
      const int64_t key = block * kWide + v, count = job.g.keys - key;
      for (int64_t c = 0; c < depth; c += kLanes) {
        Vec rows[kLanes];
        UPDP_UNROLL for (int i = 0; i < kLanes; ++i) {
          rows[i] = i < count ? load_some(k + (key + i) * token + c, depth - c) : Vec{};
        }
        transpose(rows);
        for (int64_t i = 0; i < least(depth - c, kLanes); ++i) store(packed + (c + i) * width + v, rows[i]);
      }
    }
    packed += width * depth;
  }
}

// The values of a head in blocks of columns: [block][key][channel of the block], zeros behind the last
// channel.
void pack_values(const AttentionJob& job, const float* values, float* packed) {
  for (int64_t block = 0; block < job.layout.values.blocks; ++block) {
    const int64_t width = block_width(job.layout.values, block);
    for (int64_t key = 0; key < job.g.keys; ++key, packed += width) {
      const float* from = values + key * job.v_strides.token + block * kWide;
      for (int64_t v = 0; v < width; v += kLanes)
        store(packed + v, load_some(from + v, job.g.width - block * kWide - v));
    }
  }
}

// Queries, times the scale and log2(e): the softmax is then one of powers of two.
void copy_queries(const AttentionJob& job, const float* q, int64_t count, float* to) {
  const float factor = job.scale * kLog2E;
  for (int64_t i = 0; i < count; ++i, q += job.q_strides.token, to += job.layout.query_step)
    for (int64_t c = 0; c < job.g.depth; c += kLanes)
      store(to + c, load_some(q + c, job.g.depth - c) * factor);
}

// sums[i][column] = rows[i] . b[column], for a block of packed columns.
void multiply_rows(const float* a, int64_t row, int64_t count, int64_t depth, const float* b, int64_t width,
                   float* sums, int64_t step) {
  const int64_t tiles = (count + kRows - 1) / kRows, parts = most((depth + kPart / 2) / kPart, 1);
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = part(depth, parts, p), length = part(depth, parts, p + 1) - begin;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = part(count, tiles, t), rows = part(count, tiles, t + 1) - first;
      const Rows at{a + first * row + begin, row, length, 1, 0};
      const Ahead ahead{b + (begin + length) * width, width};
      multiply_of(rows, width)(at, b + begin * width, sums + first * step, step, p > 0, nullptr, ahead);
    }
  }
}

// Powers of two of the scores over the largest; their sum comes back. What is not finite stays so.
inline float powers(float* scores, int64_t keys) {
  const int64_t last = (keys - 1) / kLanes * kLanes;
  const Vec tail = first_or_nothing(load(scores + last), keys - last);
  Vec top = tail, total = {};
  for (int64_t i = 0; i < last; i += kLanes) top = larger(load(scores + i), top);
  top = largest_of_lanes(top);
  const auto power = [top](Vec x) {
    x -= top;
    const Vec value = x < -126.0f ? Vec{} : power_of_two(x);
    return x == x ? value : x;
  };
  for (int64_t i = 0; i < last; i += kLanes) {
    const Vec value = power(load(scores + i));
    store(scores + i, value);
    total += value;
  }
  const Vec value = power(tail);
  store(scores + last, value);
  return sum_of_lanes(total + value)[0];
}

// The queries [first, first + count) of a head.
void attend(const AttentionJob& job, const float* q, int64_t count, float* scratch, float* out) {
  const AttentionGeometry& g = job.g;
  const AttentionLayout& layout = job.layout;
  float* const scores = scratch + layout.scores;
  copy_queries(job, q, count, scratch);
  for (int64_t block = 0; block < layout.keys.blocks; ++block)
    multiply_rows(scratch, layout.query_step, count, g.depth,
                  block_weight(layout.keys, scratch + layout.packed_keys, block, g.depth),
                  block_width(layout.keys, block), scores + block * kWide, layout.score_step);
  float factors[kAttentionMostRows];
  for (int64_t i = 0; i < count; ++i) factors[i] = 1.0f / powers(scores + i * layout.score_step, g.keys);
  alignas(64) float sums[kAttentionMostRows * kWide];
  for (int64_t block = 0; block < layout.values.blocks; ++block) {
    const int64_t width = block_width(layout.values, block), column = block * kWide;
    multiply_rows(scores, layout.score_step, count, g.keys,
                  block_weight(layout.values, scratch + layout.packed_values, block, g.keys), width, sums,
                  width);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = column; v < least(column + width, g.width); v += kLanes)
        store_some(out + i * g.heads * g.width + v, load(sums + i * width + v - column) * factors[i],
                   g.width - v);
  }
}

}  // namespace

void UPDP_NAME(attention, tiled, f32, UPDP_ISA)(const AttentionJob& job, int64_t begin, int64_t end,
                                                float* scratch) {
  const AttentionGeometry& g = job.g;
  const int64_t parts = job.cut.parts, rows = job.layout.rows;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / parts / g.heads, head = unit / parts % g.heads;
    const auto at = [=](const AttentionStrides& s) { return image * s.image + head * s.head; };
    if (unit == begin || unit % parts == 0) {
      pack_keys(job, job.k + at(job.k_strides), scratch + job.layout.packed_keys);
      pack_values(job, job.v + at(job.v_strides), scratch + job.layout.packed_values);
    }
    const int64_t first = part(g.queries, parts, unit % parts),
                  last = part(g.queries, parts, unit % parts + 1);
    const int64_t blocks = (last - first + rows - 1) / rows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = first + part(last - first, blocks, b),
                    to = first + part(last - first, blocks, b + 1);
      attend(job, job.q + at(job.q_strides) + from * job.q_strides.token, to - from, scratch,
             job.out + ((image * g.queries + from) * g.heads + head) * g.width);
    }
  }
}

}  // namespace updp

// conv_winograd4, conv_winograd2: F(4x4, 3x3) and F(2x2, 3x3). Compiled once per instruction set.
//
// A tile of (m + 2)^2 inputs gives m^2 outputs with (m + 2)^2 products a pair of channels. Tiles are worked
// on by the block, in three steps: inputs are transformed to points, [point][tile][channel]; each point is a
// matrix product with the weight's point; products are transformed back and finished. See conv_finish.h for
// the rule about linkage.
#include "conv_finish.h"
#include "conv_multiply.h"

namespace updp {
namespace {

constexpr float kP = kWinogradP, kQ = kWinogradQ;
constexpr float kP2 = kP * kP, kQ2 = kQ * kQ, kP3 = kP2 * kP, kQ3 = kQ2 * kQ;

template <int kM>
struct Transform;

template <>
struct Transform<4> {
  static inline void input(const Vec (&d)[6], Vec (&t)[6]) {
    t[0] = d[4] - (kP2 + kQ2) * d[2] + (kP2 * kQ2) * d[0];
    const Vec even_p = d[4] - kQ2 * d[2], odd_p = d[3] - kQ2 * d[1];
    t[1] = even_p + kP * odd_p;
    t[2] = even_p - kP * odd_p;
    const Vec even_q = d[4] - kP2 * d[2], odd_q = d[3] - kP2 * d[1];
    t[3] = even_q + kQ * odd_q;
    t[4] = even_q - kQ * odd_q;
    t[5] = d[5] - (kP2 + kQ2) * d[3] + (kP2 * kQ2) * d[1];
  }
  static inline void output(const Vec (&t)[6], Vec (&y)[4]) {
    const Vec sum_p = t[1] + t[2], difference_p = t[1] - t[2];
    const Vec sum_q = t[3] + t[4], difference_q = t[3] - t[4];
    y[0] = t[0] + sum_p + sum_q;
    y[1] = kP * difference_p + kQ * difference_q;
    y[2] = kP2 * sum_p + kQ2 * sum_q;
    y[3] = kP3 * difference_p + kQ3 * difference_q + t[5];
  }
};

template <>
struct Transform<2> {
  static inline void input(const Vec (&d)[4], Vec (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  static inline void output(const Vec (&t)[4], Vec (&y)[2]) {
    y[0] = t[0] + t[1] + t[2];
    y[1] = t[1] - t[2] + t[3];
  }
};

// Where a block lies, and its scratch: inputs' points, products, and zeros in place of what is outside the
// image.
template <int kM>
struct Block {
  static constexpr int kSide = kM + 2, kPoints = kSide * kSide;
  int64_t first, tiles;  // of the block
  int64_t down, across;  // tiles of an image
  int64_t row;           // elements of a tile's channels
  int64_t input,
      product;  // elements of a point; not a multiple of a page, or all points would share cache sets
  float *inputs, *products;
  const float* zeros;

  Block(const ConvJob& job, int64_t block, float* scratch) {
    const ConvGeometry& g = job.g;
    const ConvBlocking& b = job.blocking;
    first = part(b.items, b.blocks, block);
    tiles = part(b.items, b.blocks, block + 1) - first;
    down = (g.oh + kM - 1) / kM;
    across = (g.ow + kM - 1) / kM;
    row = (g.c + kLanes - 1) / kLanes * kLanes;
    input = tiles * row + 16;
    product = tiles * job.columns.padded + 16;
    zeros = scratch;
    inputs = scratch + job.blocking.zeros;
    products = inputs + kPoints * input;
  }
};

// A tile's place in the batch.
struct Place {
  int64_t image, y, x;  // of the first output
};

template <int kM>
inline Place place_of(const Block<kM>& b, int64_t tile) {
  const int64_t index = b.first + tile, in_image = index % (b.down * b.across);
  return {index / (b.down * b.across), in_image / b.across * kM, in_image % b.across * kM};
}

// Where the inputs of a tile are: in the image, or zeros.
template <int kM>
inline void find_inputs(const ConvJob& job, const Block<kM>& b, const Place& place,
                        const float* (&from)[kM + 2][kM + 2]) {
  constexpr int kSide = kM + 2;
  const ConvGeometry& g = job.g;
  const int64_t y = place.y - g.top, x = place.x - g.left;
  const float* corner = job.x + ((place.image * g.h + y) * g.w + x) * g.c;
  const bool is_inside = y >= 0 && y + kSide <= g.h && x >= 0 && x + kSide <= g.w;
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) {
      const bool exists = is_inside || (y + i >= 0 && y + i < g.h && x + j >= 0 && x + j < g.w);
      from[i][j] = exists ? corner + (i * g.w + j) * g.c : b.zeros;
    }
  }
}

template <int kM>
void transform_tile(const ConvJob& job, const Block<kM>& b, int64_t tile) {
  constexpr int kSide = Block<kM>::kSide;
  const ConvGeometry& g = job.g;
  const float* from[kSide][kSide];
  find_inputs(job, b, place_of(b, tile), from);
  for (int64_t c = 0; c < g.c; c += kLanes) {
    const int64_t count = least(g.c - c, kLanes);
    Vec half[kSide][kSide];
    UPDP_UNROLL for (int j = 0; j < kSide; ++j) {
      Vec d[kSide], t[kSide];
      UPDP_UNROLL for (int i = 0; i < kSide; ++i) d[i] = load_some(from[i][j] + c, count);
      Transform<kM>::input(d, t);
      UPDP_UNROLL for (int i = 0; i < kSide; ++i) half[i][j] = t[i];
    }
    float* to = b.inputs + tile * b.row + c;
    UPDP_UNROLL for (int i = 0; i < kSide; ++i) {
      Vec t[kSide];
      Transform<kM>::input(half[i], t);
      UPDP_UNROLL for (int j = 0; j < kSide; ++j) store(to + (i * kSide + j) * b.input, t[j]);
    }
  }
}

// Unit: a point and a block of columns.
template <int kM>
void multiply_unit(const ConvJob& job, const Block<kM>& b, int64_t unit) {
  const int64_t point = unit / job.columns.blocks, columns = unit % job.columns.blocks;
  const int64_t width = block_width(job.columns, columns), c = job.g.c;
  const float* weight = block_weight(job.columns, job.weight + point * job.columns.padded * c, columns, c);
  const float* from = b.inputs + point * b.input;
  float* to = b.products + point * b.product + columns * job.columns.wide;
  const int64_t parts = (b.tiles + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = part(b.tiles, parts, i), count = part(b.tiles, parts, i + 1) - begin;
    const Rows rows{from + begin * b.row, b.row, c, 1, 0};
    const Ahead ahead{weight + c * width * (parts + i) / parts, width / parts};
    multiply_of(count, width)(rows, weight, to + begin * job.columns.padded, job.columns.padded, false,
                              nullptr, ahead);
  }
}

template <int kM>
void finish_tile(const ConvJob& job, const Block<kM>& b, int64_t tile) {
  constexpr int kSide = Block<kM>::kSide;
  const ConvGeometry& g = job.g;
  const Place place = place_of(b, tile);
  const Finish finish = finish_of(job);
  alignas(64) float sums[kM * kM * kWide];
  for (int64_t column = 0; column < g.k; column += kWide) {
    const int64_t columns = least(g.k - column, kWide);
    for (int64_t v = 0; v < columns; v += kLanes) {
      const float* from = b.products + tile * job.columns.padded + column + v;
      Vec half[kM][kSide];
      UPDP_UNROLL for (int j = 0; j < kSide; ++j) {
        Vec t[kSide], y[kM];
        UPDP_UNROLL for (int i = 0; i < kSide; ++i) t[i] = load(from + (i * kSide + j) * b.product);
        Transform<kM>::output(t, y);
        UPDP_UNROLL for (int i = 0; i < kM; ++i) half[i][j] = y[i];
      }
      UPDP_UNROLL for (int i = 0; i < kM; ++i) {
        Vec y[kM];
        Transform<kM>::output(half[i], y);
        UPDP_UNROLL for (int j = 0; j < kM; ++j) store(sums + (i * kM + j) * kWide + v, y[j]);
      }
    }
    finish(job, {sums, kM * kWide, kWide, least(g.oh - place.y, kM), least(g.ow - place.x, kM),
                 ((place.image * g.oh + place.y) * g.ow + place.x) * g.k + column, g.ow * g.k, g.k, column,
                 columns});
  }
}

template <int kM>
inline void winograd(const ConvJob& job, int64_t block, int step, int64_t begin, int64_t end,
                     float* scratch) {
  const Block<kM> b(job, block, scratch);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (step == 0 && unit < b.tiles) transform_tile(job, b, unit);
    if (step == 1) multiply_unit(job, b, unit);
    if (step == 2 && unit < b.tiles) finish_tile(job, b, unit);
  }
}

}  // namespace

void UPDP_NAME(conv, winograd4, f32, UPDP_ISA)(const ConvJob& job, int64_t block, int step, int64_t begin,
                                               int64_t end, float* scratch) {
  winograd<4>(job, block, step, begin, end, scratch);
}

void UPDP_NAME(conv, winograd2, f32, UPDP_ISA)(const ConvJob& job, int64_t block, int step, int64_t begin,
                                               int64_t end, float* scratch) {
  winograd<2>(job, block, step, begin, end, scratch);
}

}  // namespace updp

// conv_direct: any kernel size and stride as a matrix product. Compiled once per instruction set.
//
// A row of the product is an output pixel, its elements the taps: of each row of the kernel, kw * c
// neighbours in NHWC. Where all taps of a tile of pixels lie inside the image they are read from there;
// elsewhere they are gathered first, with the padding's zeros. See conv_finish.h for the rule about linkage.
#include "conv_finish.h"
#include "conv_multiply.h"

namespace updp {
namespace {

// The sum is taken in parts of so many products: what is added to a sum stays comparable with it, and a part
// of the weight's columns stays in the first cache while all rows of a block meet it.
constexpr int64_t kPart = 256;

// A tile of at most kRows pixels of a block, and where its taps are.
struct Pixels {
  int64_t first, count;
  Rows rows;
};
static_assert(sizeof(Pixels) <= kConvTileBytes);

struct Block {
  const ConvJob& job;
  int64_t first, end;   // pixels of the block
  int64_t line, lines;  // pixels that are cut into tiles, and how many such lines
  int64_t parts;        // tiles of a line
  int64_t tiles;
  int64_t depth;  // taps of a pixel
  Pixels* table;  // the tiles, filled in by the first step
  float* gathered;

  Block(const ConvJob& job, int64_t block, float* scratch) : job(job) {
    const ConvGeometry& g = job.g;
    const ConvBlocking& b = job.blocking;
    first = part(b.items, b.blocks, block) * b.line;
    end = part(b.items, b.blocks, block + 1) * b.line;
    line = b.line > 1 ? b.line : end - first;
    lines = (end - first) / line;
    parts = (line + kRows - 1) / kRows;
    tiles = lines * parts;
    depth = g.kh * g.kw * g.c;
    table = reinterpret_cast<Pixels*>(scratch);
    gathered = scratch + kConvPixels * (kConvTileBytes / sizeof(float));
  }
};

// Where a tile's taps are; true if they have to be gathered there first.
bool locate(const Block& b, int64_t index, Pixels& pixels) {
  const ConvGeometry& g = b.job.g;
  const int64_t start = b.first + index / b.parts * b.line;
  pixels.first = start + part(b.line, b.parts, index % b.parts);
  pixels.count = start + part(b.line, b.parts, index % b.parts + 1) - pixels.first;
  if (b.job.blocking.plain) {
    pixels.rows = {b.job.x + pixels.first * g.c, g.c, g.c, 1, 0};
    return false;
  }
  const int64_t ox = pixels.first % g.ow, line_index = pixels.first / g.ow;
  const int64_t y = line_index % g.oh * g.sh - g.top, x = ox * g.sw - g.left, image = line_index / g.oh;
  const int64_t last_x = x + (pixels.count - 1) * g.sw + g.kw;
  if (ox + pixels.count <= g.ow && y >= 0 && y + g.kh <= g.h && x >= 0 && last_x <= g.w) {
    pixels.rows = {b.job.x + ((image * g.h + y) * g.w + x) * g.c, g.sw * g.c, g.kw * g.c, g.kh, g.w * g.c};
    return false;
  }
  pixels.rows = {b.gathered + (pixels.first - b.first) * b.depth, b.depth, g.kw * g.c, g.kh, g.kw * g.c};
  return true;
}

inline void copy(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

inline void clear(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// All taps of one output pixel.
void gather_pixel(const ConvGeometry& g, const float* image, int64_t oy, int64_t ox, float* to) {
  const int64_t x = ox * g.sw - g.left;
  const int64_t left = least(most(-x, 0), g.kw), right = most(least(g.w - x, g.kw), left);
  for (int64_t i = 0; i < g.kh; ++i, to += g.kw * g.c) {
    const int64_t y = oy * g.sh - g.top + i;
    if (y < 0 || y >= g.h) {
      clear(to, g.kw * g.c);
      continue;
    }
    clear(to, left * g.c);
    copy(to + left * g.c, image + (y * g.w + x + left) * g.c, (right - left) * g.c);
    clear(to + right * g.c, (g.kw - right) * g.c);
  }
}

// Unit: a tile.
void gather(const Block& block, int64_t index) {
  Pixels& pixels = block.table[index];
  if (!locate(block, index, pixels)) return;
  const ConvGeometry& g = block.job.g;
  for (int64_t i = 0; i < pixels.count; ++i) {
    const int64_t pixel = pixels.first + i, y = pixel / g.ow;
    const float* image = block.job.x + y / g.oh * g.h * g.w * g.c;
    gather_pixel(g, image, y % g.oh, pixel % g.ow, block.gathered + (pixel - block.first) * block.depth);
  }
}

// A part of the sum: some segments of the rows, or a piece of one, and its place among all taps.
struct Part {
  int64_t segment, segments, begin, length;
};

struct Parts {
  int64_t count, segment_pieces, group;
  explicit Parts(const Rows& rows) {
    segment_pieces = most((rows.length + kPart / 2) / kPart, 1);
    group = segment_pieces > 1 ? 1 : most(kPart / rows.length, 1);
    count = (rows.segments + group - 1) / group * segment_pieces;
  }
  Part operator()(const Rows& rows, int64_t index) const {
    const int64_t segment = index / segment_pieces * group, piece = index % segment_pieces;
    const int64_t begin = part(rows.length, segment_pieces, piece);
    return {segment, least(group, rows.segments - segment), begin,
            part(rows.length, segment_pieces, piece + 1) - begin};
  }
};

inline Rows rows_of(const Rows& rows, const Part& p) {
  return {rows.a + p.segment * rows.segment + p.begin, rows.row, p.length, p.segments, rows.segment};
}

// Unit: a block of columns, for all pixels of the block.
void multiply_unit(const Block& block, int64_t unit) {
  const ConvJob& job = block.job;
  const int64_t width = block_width(job.columns, unit), column = unit * job.columns.wide;
  const float* weight = block_weight(job.columns, job.weight, unit, block.depth);
  const Finish finish = finish_of(job);
  alignas(64) float sums[kConvPixels * kWide];
  const Parts parts(block.table[0].rows);
  const auto finish_pixels = [&](int64_t first, int64_t count, const float* from) {
    finish(job, {from, 0, width, 1, count, first * job.g.k + column, 0, job.g.k, column,
                 least(job.g.k - column, width)});
  };
  for (int64_t p = 0; p < parts.count; ++p) {
    for (int64_t t = 0; t < block.tiles; ++t) {
      const Pixels& pixels = block.table[t];
      const Part taps = parts(pixels.rows, p);
      float* to = sums + (pixels.first - block.first) * width;
      multiply_of(pixels.count, width)(rows_of(pixels.rows, taps),
                                       weight + (taps.segment * pixels.rows.length + taps.begin) * width, to,
                                       width, p > 0);
      if (p == parts.count - 1) finish_pixels(pixels.first, pixels.count, to);
    }
  }
}

}  // namespace

void UPDP_NAME(conv, direct, f32, UPDP_ISA)(const ConvJob& job, int64_t block, int step, int64_t begin,
                                            int64_t end, float* scratch) {
  const Block b(job, block, scratch);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (step == 0 && unit < b.tiles) gather(b, unit);
    if (step == 1) multiply_unit(b, unit);
  }
}

}  // namespace updp

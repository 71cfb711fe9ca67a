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
  int64_t skipped;  // rows of the kernel that lie in the padding above; those below are left out, too
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

// Where a tile's taps are; true if they have to be gathered there first. Neighbours in a line share most of
// their taps.
bool locate(const Block& b, int64_t index, Pixels& pixels) {
  const ConvGeometry& g = b.job.g;
  const int64_t start = b.first + index / b.parts * b.line;
  pixels.first = start + part(b.line, b.parts, index % b.parts);
  pixels.count = start + part(b.line, b.parts, index % b.parts + 1) - pixels.first;
  if (b.job.blocking.plain) {
    pixels.skipped = 0;
    pixels.rows = {b.job.x + pixels.first * g.c, g.c, g.c, 1, 0};
    return false;
  }
  float* const gathered = b.gathered + (pixels.first - b.first) * b.depth;
  const int64_t ox = pixels.first % g.ow, oy = pixels.first / g.ow % g.oh, image = pixels.first / g.ow / g.oh;
  const int64_t y = oy * g.sh - g.top, x = ox * g.sw - g.left, width = (pixels.count - 1) * g.sw + g.kw;
  const bool is_line = ox + pixels.count <= g.ow;
  const int64_t top = most(-y, 0), inside = least(g.h - y, g.kh) - top;
  pixels.skipped = is_line && inside > 0 ? top : 0;
  const int64_t rows = is_line ? most(inside, 1) : g.kh;
  if (is_line && inside > 0 && x >= 0 && x + width <= g.w) {
    pixels.rows = {b.job.x + ((image * g.h + y + top) * g.w + x) * g.c, g.sw * g.c, g.kw * g.c, rows,
                   g.w * g.c};
    return false;
  }
  if (is_line && g.sw <= g.kw)
    pixels.rows = {gathered, g.sw * g.c, g.kw * g.c, rows, width * g.c};
  else
    pixels.rows = {gathered, b.depth, g.kw * g.c, rows, g.kw * g.c};
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

// The inputs of neighbouring output pixels, which reach over `width` input pixels, for some rows of the
// kernel.
void gather_pixels(const ConvJob& job, int64_t pixel, int64_t width, int64_t skipped, int64_t rows,
                   float* to) {
  const ConvGeometry& g = job.g;
  const int64_t line = pixel / g.ow, x = pixel % g.ow * g.sw - g.left;
  const float* image = job.x + line / g.oh * g.h * g.w * g.c;
  const int64_t left = least(most(-x, 0), width), right = most(least(g.w - x, width), left);
  for (int64_t i = 0; i < rows; ++i, to += width * g.c) {
    const int64_t y = line % g.oh * g.sh - g.top + skipped + i;
    if (y < 0 || y >= g.h) {
      clear(to, width * g.c);
      continue;
    }
    clear(to, left * g.c);
    copy(to + left * g.c, image + (y * g.w + x + left) * g.c, (right - left) * g.c);
    clear(to + right * g.c, (width - right) * g.c);
  }
}

// Unit: a tile.
void gather(const Block& block, int64_t index) {
  Pixels& pixels = block.table[index];
  if (!locate(block, index, pixels)) return;
  const Rows& rows = pixels.rows;
  float* const to = block.gathered + (pixels.first - block.first) * block.depth;
  const int64_t c = block.job.g.c;
  if (rows.row != block.depth)
    return gather_pixels(block.job, pixels.first, rows.segment / c, pixels.skipped, rows.segments, to);
  for (int64_t i = 0; i < pixels.count; ++i)
    gather_pixels(block.job, pixels.first + i, rows.length / c, pixels.skipped, rows.segments,
                  to + i * block.depth);
}

// A part of the sum: some segments of the rows, or a piece of one, and its place among all taps.
struct Part {
  int64_t segment, segments, begin, length;
};

struct Parts {
  int64_t segments, length;  // of a pixel
  int64_t count, pieces, group;
  explicit Parts(const ConvGeometry& g) : segments(g.kh), length(g.kw * g.c) {
    pieces = most((length + kPart / 2) / kPart, 1);
    group = pieces > 1 ? 1 : most(kPart / length, 1);
    count = (segments + group - 1) / group * pieces;
  }
  Part operator()(int64_t index) const {
    const int64_t segment = index / pieces * group, piece = index % pieces,
                  begin = part(length, pieces, piece);
    return {segment, least(group, segments - segment), begin, part(length, pieces, piece + 1) - begin};
  }
};

// A part of the sums of a tile: what is not in the padding above and below. Finishes if it is the last one.
void multiply_tile(const Block& block, int64_t tile, const Part& taps, int64_t unit, float* sums) {
  const ConvJob& job = block.job;
  const Pixels& pixels = block.table[tile];
  sums += (pixels.first - block.first) * block_width(job.columns, unit);
  const Rows& rows = pixels.rows;
  const int64_t from = most(taps.segment, pixels.skipped), end = pixels.skipped + rows.segments;
  const int64_t to = least(taps.segment + taps.segments, end);
  if (from >= to) return;
  const int64_t width = block_width(job.columns, unit), column = unit * job.columns.wide;
  const bool is_first = from == pixels.skipped && taps.begin == 0;
  const bool is_last = to == end && taps.begin + taps.length == rows.length;
  const float* a = rows.a + (from - pixels.skipped) * rows.segment + taps.begin;
  const float* b =
      block_weight(job.columns, job.weight, unit, block.depth) + (from * rows.length + taps.begin) * width;
  const int64_t at = pixels.first * job.g.k + column;
  // What is written last is asked for first.
  for (int64_t i = 0; i < pixels.count && is_last; ++i)
    for (int64_t v = 0; v < width; v += 16) __builtin_prefetch(job.out + at + i * job.g.k + v, 1);
  // What comes behind this part of the weight is the next one: each tile asks for its share.
  const int64_t share = (to - from) * taps.length * width / block.tiles;
  const Ahead ahead{b + (block.tiles + tile) * share, width / block.tiles};
  Bounds bounds;
  const bool is_bounded = is_last && bounds_of(job, column, at, bounds);
  multiply_of(pixels.count, width)({a, rows.row, taps.length, to - from, rows.segment}, b, sums, width,
                                   !is_first, is_bounded ? &bounds : nullptr, ahead);
  if (is_last && !is_bounded)
    finish_of(job)(job,
                   {sums, 0, width, 1, pixels.count, at, 0, job.g.k, column, least(job.g.k - column, width)});
}

// Unit: a block of columns, for all pixels of the block.
void multiply_unit(const Block& block, int64_t unit) {
  const Parts parts(block.job.g);
  alignas(64) float sums[kConvPixels * kWide];
  for (int64_t p = 0; p < parts.count; ++p) {
    const Part taps = parts(p);
    for (int64_t tile = 0; tile < block.tiles; ++tile) multiply_tile(block, tile, taps, unit, sums);
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

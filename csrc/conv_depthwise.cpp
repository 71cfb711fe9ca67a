// conv_depthwise: every channel by itself, channels in vector lanes. Compiled once per instruction set.
//
// A tile is a few neighbouring outputs of a line; their sums stay in registers, and an input that is loaded
// serves all outputs that it belongs to. Lines in the padding are left out. See conv_finish.h for the rule
// about linkage.
#include "conv_finish.h"
#include "conv_multiply.h"

namespace updp {
namespace {

// Outputs of a tile, for which there is a function each: as many as the registers hold with their inputs.
#if defined(__AVX512F__)
constexpr int kColumns = 8;
#define UPDP_COLUMNS 1, 2, 3, 4, 5, 6, 7, 8
#else
constexpr int kColumns = 4;
#define UPDP_COLUMNS 1, 2, 3, 4
#endif

// What a tile reads should stay in the first cache until its neighbour has read it.
constexpr int64_t kCacheBytes = 36 << 10;
// Lines of about so many outputs are worked on together, one block of channels after the other.
constexpr int64_t kStripPixels = 256;

// Some neighbouring outputs of a line and some vectors of channels: what they read and where they go.
struct Span {
  const float* x;      // the first line that lies in the image, at its first pixel
  int64_t skipped;     // lines of the kernel above the image
  int64_t lines;       // of the kernel, inside the image
  int64_t column;      // of the first tap, may lie in the padding
  int64_t out;         // the first output, at its first channel
  int64_t begin, end;  // vectors of channels
};

// The last vector ends with the last channel, and so may share some channels with the one before it.
inline int64_t first_channel(const ConvGeometry& g, int64_t vector) {
  return most(least(vector * kLanes, g.c - kLanes), 0);
}

// One line of the kernel. kIsEdge: some columns lie in the padding, or there are fewer channels than lanes.
template <int kCount, int kWidth, int kStride, bool kIsEdge>
inline void add_line(const ConvGeometry& g, const float* x, int64_t column, const float* weight,
                     int64_t channels, Vec (&total)[kCount][1]) {
  const auto input = [&](const float* from) { return kIsEdge ? load_some(from, channels) : load(from); };
  if constexpr (kWidth == 0) {
    for (int64_t tap = 0; tap < g.kw; ++tap) {
      const Vec w = load(weight + tap * kLanes);
      UPDP_UNROLL for (int i = 0; i < kCount; ++i) {
        const int64_t at = column + i * g.sw + tap;
        if (!kIsEdge || (at >= 0 && at < g.w)) total[i][0] += input(x + at * g.c) * w;
      }
    }
  } else {
    // Inputs are loaded once. Tap by tap, a sum waits for the one before only after all others had their
    // turn.
    constexpr int kInputs = (kCount - 1) * kStride + kWidth;
    Vec values[kInputs];
    // One pointer for three columns: their addresses are the pointer plus 0, 1 or 2 times the channels.
    const float* at = x + column * g.c;
    _Pragma("GCC unroll 32") for (int j = 0; j < kInputs; ++j) {
      const bool is_there = !kIsEdge || (column + j >= 0 && column + j < g.w);
      values[j] = in_register(is_there ? input(at + j % 3 * g.c) : Vec{});
      if (j % 3 == 2) at += 3 * g.c;
    }
    UPDP_UNROLL for (int tap = 0; tap < kWidth; ++tap) {
      const Vec w = load(weight + tap * kLanes);
      UPDP_UNROLL for (int i = 0; i < kCount; ++i) total[i][0] += values[i * kStride + tap] * w;
    }
  }
}

template <int kCount, int kWidth, int kStride, bool kIsEdge>
void do_tile(const ConvJob& job, const Span& tile) {
  const ConvGeometry& g = job.g;
  const int64_t channels = least(g.c, kLanes), width = kWidth ? kWidth : g.kw;
  for (int64_t vector = tile.begin; vector < tile.end; ++vector) {
    const int64_t channel = first_channel(g, vector), at = tile.out + channel;
    const float* x = tile.x + channel;
    const float* weight = job.weight + (vector * g.kh + tile.skipped) * width * kLanes;
    Vec total[kCount][1] = {};
    for (int64_t line = 0; line < tile.lines; ++line, x += g.w * g.c, weight += width * kLanes)
      add_line<kCount, kWidth, kStride, kIsEdge>(g, x, tile.column, weight, channels, total);
    Bounds bounds;
    if (bounds_of(job, channel, at, bounds)) {
      store_bounded(total, bounds);
      continue;
    }
    alignas(64) float sums[kCount * kLanes];
    UPDP_UNROLL for (int i = 0; i < kCount; ++i) store(sums + i * kLanes, total[i][0]);
    finish_of(job)(job, {sums, 0, kLanes, 1, kCount, at, 0, g.k, channel, channels});
  }
}

using DoTile = void (*)(const ConvJob& job, const Span& tile);

template <int kWidth, int kStride, bool kIsEdge, int... kCounts>
constexpr DoTile kTiles[] = {nullptr, do_tile<kCounts, kWidth, kStride, kIsEdge>...};

// Tables of functions for 1 to kColumns outputs: inside the image, and at its edges.
struct Functions {
  const DoTile* inside;
  const DoTile* edge;
};

template <int kWidth, int kStride>
constexpr Functions kFunctions = {kTiles<kWidth, kStride, false, UPDP_COLUMNS>,
                                  kTiles<kWidth, kStride, true, UPDP_COLUMNS>};

Functions functions_of(const ConvGeometry& g) {
  if (g.sw == 1 && g.kw == 3) return kFunctions<3, 1>;
  if (g.sw == 1 && g.kw == 5) return kFunctions<5, 1>;
  if (g.sw == 1 && g.kw == 7) return kFunctions<7, 1>;
  if (g.sw == 2 && g.kw == 3) return kFunctions<3, 2>;
  if (g.sw == 2 && g.kw == 5) return kFunctions<5, 2>;
  if (g.sw == 2 && g.kw == 7) return kFunctions<7, 2>;
  return kFunctions<0, 0>;
}

// A line of the output, for some vectors of channels.
void do_line(const ConvJob& job, const Functions& functions, int64_t line, int64_t begin, int64_t end) {
  const ConvGeometry& g = job.g;
  const int64_t y = line % g.oh * g.sh - g.top, skipped = least(most(-y, 0), g.kh);
  const int64_t lines = most(least(g.h - y, g.kh) - skipped, 0);
  const float* x = lines == 0 ? job.x : job.x + (line / g.oh * g.h + y + skipped) * g.w * g.c;
  const int64_t parts = (g.ow + kColumns - 1) / kColumns;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t first = part(g.ow, parts, p), count = part(g.ow, parts, p + 1) - first;
    const int64_t column = first * g.sw - g.left;
    const bool is_inside = column >= 0 && column + (count - 1) * g.sw + g.kw <= g.w && g.c >= kLanes;
    (is_inside ? functions.inside : functions.edge)[count](
        job, {x, skipped, lines, column, (line * g.ow + first) * g.k, begin, end});
  }
}

}  // namespace

void UPDP_NAME(conv, depthwise, f32, UPDP_ISA)(const ConvJob& job, int64_t block, int, int64_t begin,
                                               int64_t end, float*) {
  const ConvBlocking& b = job.blocking;
  const int64_t first = part(b.items, b.blocks, block), last = part(b.items, b.blocks, block + 1);
  const ConvGeometry& g = job.g;
  const int64_t lines = most(kStripPixels / g.ow, 1), vectors = job.columns.padded / kLanes;
  const int64_t taps = g.kh * ((kColumns - 1) * g.sw + 2 * g.kw);
  const int64_t together = most(kCacheBytes / int64_t{sizeof(Vec)} / taps, 1);
  const Functions functions = functions_of(g);
  end = least(first + end, last);
  for (int64_t strip = first + begin; strip < end; strip += lines)
    for (int64_t v = 0; v < vectors; v += together)
      for (int64_t line = strip; line < least(strip + lines, end); ++line)
        do_line(job, functions, line, v, least(v + together, vectors));
}

}  // namespace updp

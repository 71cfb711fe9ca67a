// conv: a float32 convolution, dense or depthwise, with everything that follows it in a network.
//
//   out = affine(activation(conv(x, weight) + bias [+ residual])) [+ residual]      (see updp/ops for the
//   definition)
//
// Activations are NHWC: (n, h, w, c) dense. Weights are packed once (conv_pack.cpp), differently for each
// algorithm and instruction set. A nn.Linear over (rows, c) is the 1x1 convolution of an image of one row.
#pragma once

#include <cstdint>
#include <string_view>

namespace updp {

enum class Activation : int32_t { kNone, kRelu, kRelu6, kGelu, kSilu, kHardswish };
constexpr int kActivations = 6;

struct ConvGeometry {
  int64_t n, h, w, c;                // input
  int64_t k, kh, kw;                 // output channels, kernel size
  int64_t sh, sw;                    // stride
  int64_t top, left, bottom, right;  // zero padding
  int64_t oh, ow;                    // output size, filled in by conv_geometry
  int64_t groups;                    // 1, or c of a depthwise convolution, where k is c, too
};

// Pointers may be null, except where the sizes say otherwise: bias, scale and shift have k elements; residual
// is as out, or as one image of it, and then the same for all: it repeats after residual_period elements.
struct ConvEpilogue {
  const float* bias;
  const float* scale;
  const float* shift;
  const float* residual;
  int64_t residual_period;
  Activation activation;
  bool residual_first;  // residual is added before the activation, not at the end
};

// The packed columns (output channels) of a weight stand in blocks of `wide` columns; the last block is one
// vector
// (`lanes` columns) narrow where that is enough. Within a block: (c-or-tap index, column).
struct ConvColumns {
  int64_t lanes;
  int64_t wide;    // 2 * lanes
  int64_t blocks;  // of `wide` columns, the last one may be narrow
  int64_t padded;  // k rounded up to lanes: columns of all blocks
};

// What an algorithm needs, and how its work is cut. The work is a list of blocks (of output pixels or tiles),
// each of them a few steps, each of those a range of units that may be done in any order: by one thread, or
// shared by several.
constexpr int kMaxSteps = 3;
constexpr int64_t kConvPixels = 168;    // of a block of the direct algorithm, at most
constexpr int64_t kConvTileBytes = 64;  // that it notes for each tile of pixels
struct ConvBlocking {
  int64_t items;             // pixels, rows or tiles of the output in all
  int64_t line;              // pixels of an item, 1 for pixels that are worked on wherever they lie
  bool plain;                // a 1x1 convolution that skips nothing: pixels are rows of the input
  int64_t blocks;            // into which the items are cut evenly
  int64_t scratch;           // elements that one block needs
  int64_t zeros;             // of them, how many at the beginning are zero and stay so
  int steps;                 // of each block
  int64_t units[kMaxSteps];  // of each step, for the largest block
  int workers;               // threads that are worth their start
};

struct ConvJob {
  ConvGeometry g;
  ConvColumns columns;
  ConvBlocking blocking;
  ConvEpilogue epilogue;
  const float* x;
  const float* weight;  // packed
  float* out;
};

// A kernel does the units [begin, end) of one step of one block. Scratch is aligned to 64 bytes, belongs to
// the block and is kept between its steps.
using ConvKernel = void (*)(const ConvJob& job, int64_t block, int step, int64_t begin, int64_t end,
                            float* scratch);

// F(4x4, 3x3) interpolates at 0, +-P, +-Q and infinity: of the small points tried, these lose least.
constexpr float kWinogradP = 0.75f, kWinogradQ = 1.5f;

// 4 for "winograd4", 2 for "winograd2", 0 for any other algorithm.
int64_t conv_tile(std::string_view algorithm);

// Whether every channel is convolved by itself.
bool conv_is_depthwise(std::string_view algorithm);

// Products that an element of the output takes.
int64_t conv_depth(const ConvGeometry& g);

// Fills oh and ow; throws std::invalid_argument for sizes that make no sense or overflow.
void conv_geometry(ConvGeometry& g);

// The columns of k output channels on vectors of `lanes` floats.
ConvColumns conv_columns(int64_t k, int64_t lanes);

// Elements of a packed weight. Throws where the algorithm cannot do this kernel size.
int64_t conv_packed_size(std::string_view algorithm, int64_t lanes, const ConvGeometry& g);

// Packs a contiguous (k, c / groups, kh, kw) weight.
void conv_pack(std::string_view algorithm, int64_t lanes, const ConvGeometry& g, const float* weight,
               float* packed);

// How the work is cut for at most so many threads.
ConvBlocking conv_blocking(std::string_view algorithm, const ConvGeometry& g, const ConvColumns& columns,
                           int threads);

// Elements of scratch that a thread needs, aligned to 64 bytes.
int64_t conv_scratch(const ConvBlocking& blocking);

// Runs a kernel over all blocks on this thread alone.
void conv_alone(ConvKernel kernel, const ConvJob& job, float* scratch);

// Runs a kernel over all blocks. The result does not depend on the number of threads.
void conv(ConvKernel kernel, const ConvJob& job);

}  // namespace updp

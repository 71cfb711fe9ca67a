#include "conv.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "scratch.h"

namespace updp {
namespace {

// Below this many products for a thread, starting it costs more than it brings.
constexpr int64_t kProductsPerThread = int64_t{1} << 19;
// Bytes of a block that should stay in a core's second cache.
constexpr int64_t kCacheBytes = 640 << 10;

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result) || result > std::numeric_limits<int64_t>::max() / 4096)
    throw std::invalid_argument("conv: sizes overflow");
  return result;
}

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(const char* what, int64_t value, int64_t least) {
  if (value < least || value > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string("conv: ") + what + " is " + std::to_string(value) +
                                ", allowed: " + std::to_string(least) + " to " +
                                std::to_string(std::numeric_limits<int32_t>::max()));
}

int64_t out_size(int64_t size, int64_t padding, int64_t kernel, int64_t stride) {
  if (size + padding < kernel)
    throw std::invalid_argument("conv: the padded input has a size of " + std::to_string(size + padding) +
                                ", the weight one of " + std::to_string(kernel));
  return (size + padding - kernel) / stride + 1;
}

// The work of one thread in a block that several share.
void do_units(ConvKernel kernel, const ConvJob& job, int64_t block, int step, int64_t worker, int64_t workers,
              float* scratch) {
  const int64_t units = job.blocking.units[step];
  kernel(job, block, step, units * worker / workers, units * (worker + 1) / workers, scratch);
}

// Some blocks, one after the other, on this thread.
void do_blocks(ConvKernel kernel, const ConvJob& job, int64_t begin, int64_t end, float* scratch) {
  std::fill_n(scratch, job.blocking.zeros, 0.0f);
  for (int64_t block = begin; block < end; ++block)
    for (int step = 0; step < job.blocking.steps; ++step) do_units(kernel, job, block, step, 0, 1, scratch);
}

int64_t products_of(const ConvGeometry& g) { return g.n * g.oh * g.ow * g.k * conv_depth(g); }

ConvBlocking direct_blocking(const ConvGeometry& g, const ConvColumns& columns) {
  const int64_t depth = g.kh * g.kw * g.c;
  ConvBlocking b{};
  b.plain = g.kh * g.kw == 1 && g.sh * g.sw == 1 && g.oh == g.h && g.ow == g.w;
  // Lines of the output, unless they are so short that the register tile would be half empty, or too long.
  b.line = !b.plain && g.ow >= 8 && g.ow <= kConvPixels ? g.ow : 1;
  b.items = g.n * g.oh * g.ow / b.line;
  // What an item reads: neighbours in a line share most of it.
  const int64_t inputs = b.line > 1 ? g.kh * std::min(g.w, (b.line - 1) * g.sw + g.kw) * g.c : depth;
  const int64_t pixels =
      std::clamp<int64_t>(kCacheBytes / int64_t{sizeof(float)} / inputs * b.line, 28, kConvPixels);
  const int64_t most = std::max<int64_t>(pixels / b.line, 1);
  b.blocks = ceiling(b.items, most);
  b.steps = 2;
  const int64_t noted = kConvPixels * kConvTileBytes / int64_t{sizeof(float)};
  b.scratch = noted + (b.plain ? 0 : std::min(b.items, most) * b.line * depth);
  b.units[0] = std::min(b.items, most) * b.line;
  b.units[1] = columns.blocks;
  return b;
}

// Threads take lines of the output; nothing but the input and the output is in memory.
ConvBlocking depthwise_blocking(const ConvGeometry& g) {
  ConvBlocking b{};
  b.line = g.ow;
  b.items = b.units[0] = g.n * g.oh;
  b.blocks = b.steps = 1;
  return b;
}

ConvBlocking winograd_blocking(int64_t tile, const ConvGeometry& g, const ConvColumns& columns) {
  const int64_t points = (tile + 2) * (tile + 2);
  const int64_t row = ceiling(g.c, columns.lanes) * columns.lanes;
  const int64_t bytes = points * (row + columns.padded) * int64_t{sizeof(float)};
  const bool large = points * g.c * columns.padded > (1 << 20);
  const int64_t most = large ? 140 : std::clamp<int64_t>(kCacheBytes / bytes, 28, 98);
  ConvBlocking b{};
  b.line = 1;
  b.items = g.n * ceiling(g.oh, tile) * ceiling(g.ow, tile);
  b.blocks = ceiling(b.items, most);
  b.steps = 3;
  b.zeros = ceiling(g.c, 16) * 16;
  const int64_t tiles = ceiling(b.items, b.blocks);
  b.scratch = b.zeros + points * (tiles * (row + columns.padded) + 32);
  b.units[0] = b.units[2] = tiles;
  b.units[1] = points * columns.blocks;
  return b;
}

}  // namespace

void conv_geometry(ConvGeometry& g) {
  require("the batch", g.n, 0);
  for (const int64_t size : {g.h, g.w}) require("a size of the input", size, 0);
  require("the number of input channels", g.c, 1);
  require("the number of output channels", g.k, 1);
  for (const int64_t size : {g.kh, g.kw}) require("a size of the weight", size, 1);
  for (const int64_t stride : {g.sh, g.sw}) require("a stride", stride, 1);
  for (const int64_t padding : {g.top, g.left, g.bottom, g.right}) require("a padding", padding, 0);
  g.oh = out_size(g.h, g.top + g.bottom, g.kh, g.sh);
  g.ow = out_size(g.w, g.left + g.right, g.kw, g.sw);
  // Kernels index elements with 64 bits; a block's scratch is some 36 times its part of the input at most.
  product(product(g.n, product(g.h, g.w)), g.c);
  product(product(g.n, product(g.oh, g.ow)), product(g.k, product(g.c / g.groups, product(g.kh, g.kw))));
}

ConvBlocking conv_blocking(std::string_view algorithm, const ConvGeometry& g, const ConvColumns& columns,
                           int threads) {
  const int64_t tile = conv_tile(algorithm);
  if (tile && (g.sh != 1 || g.sw != 1))
    throw std::invalid_argument("conv: " + std::string(algorithm) + " is for stride 1");
  if (g.n == 0) return {};
  ConvBlocking b = tile                           ? winograd_blocking(tile, g, columns)
                   : conv_is_depthwise(algorithm) ? depthwise_blocking(g)
                                                  : direct_blocking(g, columns);
  const int64_t useful = std::max<int64_t>(products_of(g) / kProductsPerThread, 1);
  b.workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), useful));
  // As many blocks for every thread, unless they would become too small.
  const int64_t even = ceiling(b.blocks, b.workers) * b.workers, fewest = b.line > 1 ? 1 : 14;
  if (b.items / even >= fewest) b.blocks = even;
  return b;
}

int64_t conv_scratch(const ConvBlocking& blocking) { return ceiling(blocking.scratch, 64) * 64; }

void conv_alone(ConvKernel kernel, const ConvJob& job, float* scratch) {
  do_blocks(kernel, job, 0, job.blocking.blocks, scratch);
}

void conv(ConvKernel kernel, const ConvJob& job) {
  const ConvBlocking& b = job.blocking;
  if (b.items == 0) return;
  thread_local Scratch scratch;
  const bool shared = b.blocks < b.workers;
  const int workers = b.workers;
  // Each thread's scratch begins on its own cache lines.
  const int64_t size = conv_scratch(b);
  float* const memory = scratch.of(shared ? size : size * workers);
  if (workers == 1) return do_blocks(kernel, job, 0, b.blocks, memory);
  if (!shared) {
#pragma omp parallel for num_threads(workers) schedule(static, 1)
    for (int worker = 0; worker < workers; ++worker)
      do_blocks(kernel, job, b.blocks * worker / workers, b.blocks * (worker + 1) / workers,
                memory + worker * size);
    return;
  }
  std::fill_n(memory, b.zeros, 0.0f);
  for (int64_t block = 0; block < b.blocks; ++block) {
    for (int step = 0; step < b.steps; ++step) {
#pragma omp parallel for num_threads(workers) schedule(static, 1)
      for (int worker = 0; worker < workers; ++worker)
        do_units(kernel, job, block, step, worker, workers, memory);
    }
  }
}

}  // namespace updp

#include "attention.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "scratch.h"

namespace updp {
namespace {

// Below this many products for a thread, starting it costs more than it brings.
constexpr int64_t kProductsPerThread = int64_t{1} << 19;
// Elements of the scores that are worked on together: they should stay in a core's second cache, beside the
// keys.
constexpr int64_t kScores = 12 << 10;
constexpr int64_t kLine = 16;  // elements of a cache line

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

int64_t odd_lines(int64_t elements) { return ((elements + kLine - 1) / kLine | 1) * kLine; }

void require(const char* what, int64_t value, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (value < least || value > kMost)
    throw std::invalid_argument(std::string("attention: ") + what + " is " + std::to_string(value) +
                                ", allowed: " + std::to_string(least) + " to " + std::to_string(kMost));
}

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result) || result > std::numeric_limits<int64_t>::max() / 4096)
    throw std::invalid_argument("attention: sizes overflow");
  return result;
}

}  // namespace

void attention_check(const AttentionGeometry& g) {
  require("the batch", g.batch, 0);
  require("the number of heads", g.heads, 0);
  require("the number of queries", g.queries, 0);
  require("the number of keys", g.keys, 1);
  require("the number of channels of q and k", g.depth, 1);
  require("the number of channels of v", g.width, 1);
  product(product(product(g.batch, g.heads), product(g.queries, g.keys)), g.depth + g.width);
}

AttentionLayout attention_layout(const AttentionGeometry& g, int64_t lanes) {
  AttentionLayout layout{};
  layout.keys = conv_columns(g.keys, lanes);
  layout.values = conv_columns(g.width, lanes);
  layout.query_step = odd_lines(g.depth);
  layout.score_step = odd_lines(layout.keys.padded);
  layout.rows = std::clamp<int64_t>(kScores / layout.score_step, kAttentionRows, kAttentionMostRows);
  layout.scores = layout.rows * layout.query_step;
  layout.packed_keys = layout.scores + layout.rows * layout.score_step;
  layout.packed_values = layout.packed_keys + round_up(layout.keys.padded * g.depth, kLine);
  layout.size = layout.packed_values + round_up(layout.values.padded * g.keys, kLine);
  return layout;
}

AttentionCut attention_cut(const AttentionGeometry& g, int threads) {
  const int64_t pairs = g.batch * g.heads;
  if (pairs == 0 || g.queries == 0) return {};
  const int64_t products = pairs * g.queries * g.keys * (g.depth + g.width);
  const int64_t useful = std::clamp<int64_t>(products / kProductsPerThread, 1, pairs * g.queries);
  AttentionCut cut{};
  cut.workers = static_cast<int>(std::min<int64_t>(std::max(threads, 1), useful));
  cut.parts = cut.workers / std::gcd(pairs, int64_t{cut.workers});  // as many units for every thread
  cut.units = pairs * cut.parts;
  return cut;
}

void attention(AttentionKernel kernel, const AttentionJob& job) {
  const int workers = job.cut.workers;
  if (job.cut.units == 0) return;
  thread_local Scratch scratch;
  const int64_t size = round_up(job.layout.size, 4 * kLine);
  float* const memory = scratch.of(size * workers);
  if (workers == 1) return kernel(job, 0, job.cut.units, memory);
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker)
    kernel(job, job.cut.units * worker / workers, job.cut.units * (worker + 1) / workers,
           memory + worker * size);
}

}  // namespace updp

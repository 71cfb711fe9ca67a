#include "layer_norm.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace updp {
namespace {

// Below this many elements for a thread, starting it costs more than it brings.
constexpr int64_t kElementsPerThread = int64_t{1} << 15;

}  // namespace

void layer_norm_check(int64_t rows, int64_t channels) {
  int64_t size;
  if (rows < 0)
    throw std::invalid_argument("layer_norm: got " + std::to_string(rows) + " rows, allowed: from 0");
  if (channels < 1 || channels > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("layer_norm: got " + std::to_string(channels) + " channels, allowed: 1 to " +
                                std::to_string(std::numeric_limits<int32_t>::max()));
  if (__builtin_mul_overflow(rows, channels, &size) || size > std::numeric_limits<int64_t>::max() / 4096)
    throw std::invalid_argument("layer_norm: sizes overflow");
}

void layer_norm(LayerNormKernel kernel, const LayerNormJob& job, int threads) {
  const int64_t useful = std::min(job.rows, job.rows * job.channels / kElementsPerThread);
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(useful, 1)));
  if (workers == 1) return kernel(job, 0, job.rows);
  const int64_t share = job.rows / workers, more = job.rows % workers;
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int64_t worker = 0; worker < workers; ++worker)
    kernel(job, share * worker + std::min(more, worker), share * (worker + 1) + std::min(more, worker + 1));
}

}  // namespace updp

// layer_norm: each row of channels less its mean, divided by its standard deviation; for inference.
#pragma once

#include <cstdint>

namespace updp {

struct LayerNormJob {
  int64_t rows, channels;  // dense
  float eps;
  const float* x;
  const float* weight;  // of each channel, or nullptr; so is the bias
  const float* bias;
  float* out;
};

// A kernel does the rows [begin, end).
using LayerNormKernel = void (*)(const LayerNormJob& job, int64_t begin, int64_t end);

// Throws std::invalid_argument for sizes that make no sense or overflow.
void layer_norm_check(int64_t rows, int64_t channels);

// Runs a kernel over all rows. The result does not depend on the number of threads.
void layer_norm(LayerNormKernel kernel, const LayerNormJob& job, int threads);

}  // namespace updp

// attention: softmax(q k^T * scale) v in float32, for inference.
//
// q, k and v are (batch, heads, tokens, channels) in any strides whose last is 1: parts of one packed tensor
// need not be copied. The output is (batch, queries, heads, width), dense.
#pragma once

#include <cstdint>

#include "conv.h"

namespace updp {

constexpr int64_t kAttentionRows = 14;      // queries that are worked on together, at least
constexpr int64_t kAttentionMostRows = 56;  // and at most

struct AttentionGeometry {
  int64_t batch, heads;
  int64_t queries, keys;  // tokens
  int64_t depth;          // channels of a head of q and k
  int64_t width;          // channels of a head of v
};

// Elements from one (image, head, token) to the next.
struct AttentionStrides {
  int64_t image, head, token;
};

// How the work is cut: a unit is a part of the queries of one head of one image. Units of the same head that
// a thread does one after the other share its packed keys and values.
struct AttentionCut {
  int64_t parts;  // of a head's queries
  int64_t units;
  int workers;  // threads that are worth their start
};

// What a unit notes in its scratch, in elements: queries that are worked on together, their scores, and the
// head's keys and values in packed columns. Rows are an odd number of cache lines apart.
struct AttentionLayout {
  ConvColumns keys, values;
  int64_t rows;        // queries that are worked on together
  int64_t query_step;  // from one of them to the next
  int64_t score_step;
  int64_t scores, packed_keys, packed_values;  // where they begin; queries are at 0
  int64_t size;
};

struct AttentionJob {
  AttentionGeometry g;
  AttentionLayout layout;
  AttentionCut cut;
  AttentionStrides q_strides, k_strides, v_strides;
  const float* q;
  const float* k;
  const float* v;
  float scale;
  float* out;
};

// A kernel does the units [begin, end). Scratch is aligned to 64 bytes.
using AttentionKernel = void (*)(const AttentionJob& job, int64_t begin, int64_t end, float* scratch);

// Throws std::invalid_argument for sizes that make no sense or overflow.
void attention_check(const AttentionGeometry& g);

AttentionLayout attention_layout(const AttentionGeometry& g, int64_t lanes);
AttentionCut attention_cut(const AttentionGeometry& g, int threads);

// Runs a kernel over all units. The result does not depend on the number of threads.
void attention(AttentionKernel kernel, const AttentionJob& job);

}  // namespace updp

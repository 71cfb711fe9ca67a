// dwcompose: the weight of two depthwise convolutions, one after the other.
//
//   out[c, (d1 a1 + s1 d2 a2) / g] = sum W2[c, a2] W1[c, a1]        (per axis; see updp/ops/depthwise.py for
//   the definition)
//
// The two axes are independent, so a tap of the result is a sum over (pairs along h) x (pairs along w). The
// pairs of each axis are listed once per call; kernels walk the lists for a range of channels.
#pragma once

#include <cstdint>

namespace updp {

// One outer and one inner tap (of one axis) that meet at the same tap of the result.
struct TapPair {
  int32_t outer;
  int32_t inner;
};

// pairs[first[o]] .. pairs[first[o + 1] - 1] meet at tap o, sorted by the outer tap: this order is the order
// of summation, the same in every kernel and in the reference, so that all give the same bits.
struct AxisView {
  int32_t outer_size;
  int32_t inner_size;
  int32_t out_size;
  const int32_t* first;
  const TapPair* pairs;
};

// Weights are dense (channels, h, w).
template <typename T>
struct DwComposeJob {
  const T* outer;
  const T* inner;
  T* out;
  AxisView h;
  AxisView w;
};

// Channels are worked on kLaneBytes at a time: two AVX-512 registers, which hides the latency of their
// additions.
constexpr int kLaneBytes = 128;

// Elements of scratch that a kernel needs; it must be aligned to kLaneBytes.
template <typename T>
int64_t dwcompose_scratch(const DwComposeJob<T>& job) {
  const int64_t taps = int64_t{job.h.outer_size} * job.w.outer_size +
                       int64_t{job.h.inner_size} * job.w.inner_size +
                       int64_t{job.h.out_size} * job.w.out_size;
  return taps * (kLaneBytes / static_cast<int64_t>(sizeof(T)));
}

// A kernel computes the channels [begin, end).
template <typename T>
using DwComposeKernel = void (*)(const DwComposeJob<T>& job, int64_t begin, int64_t end, T* scratch);

// Sizes of a call, as they come in through the door; (h, w) each.
struct DwComposeGeometry {
  int64_t channels;
  int64_t outer_size[2];
  int64_t inner_size[2];
  int64_t inner_stride[2];
  int64_t inner_dilation[2];
  int64_t outer_dilation[2];
};

// The size of the result; throws std::invalid_argument for sizes below 1 and for sizes that overflow.
void dwcompose_out_size(const DwComposeGeometry& geometry, int64_t out_size[2]);

// Runs `kernel` over all channels on at most `threads` threads. The result does not depend on `threads`.
template <typename T>
void dwcompose(DwComposeKernel<T> kernel, const DwComposeGeometry& geometry, const T* outer, const T* inner,
               T* out, int threads);

}  // namespace updp
